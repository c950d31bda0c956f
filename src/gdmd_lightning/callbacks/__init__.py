"""What watches a training: evaluation, the record of gradient rewards, clean interruption."""
