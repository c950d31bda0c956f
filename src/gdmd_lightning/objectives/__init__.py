"""Losses and advantages as pure functions of tensors: no module, no configuration, no device."""
