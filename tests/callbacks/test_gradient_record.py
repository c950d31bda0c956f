def test_x(recorded_run):
    print(sorted(p.name for p in recorded_run.rglob("*")))
