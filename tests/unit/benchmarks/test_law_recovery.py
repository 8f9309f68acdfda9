"""Coverage of fitted intervals on synthetic studies, as benchmarks/law_recovery.py measures it."""

import sys

import pandas as pd
import pytest


def test_a_stopped_measurement_goes_on(tmp_path, monkeypatch, capsys):
    import law_recovery

    out = tmp_path / "results.csv"
    counted = []

    def fake(number, resamples):
        counted.append(number)
        return {"replica": number, "loss_masked": "p110", "critical": "p01", "seconds": 1}

    monkeypatch.setattr(law_recovery, "replica", fake)
    for replicas in ("2", "3"):
        words = ["law_recovery.py", "--replicas", replicas, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", words)
        law_recovery.main()
    assert counted == [0, 1, 2]
    assert "commit" in out.read_text().splitlines()[0]
    assert "by point: 1.00 1.00 0.00" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_intervals_cover_the_truth():
    """Of 40 replicas, within two standard errors of 0.9 were all points of a replica one."""
    import law_recovery

    done = pd.DataFrame([law_recovery.replica(number, 100) for number in range(40)])
    for name, shares in law_recovery.coverage(done).items():
        assert 0.8 <= shares.mean() <= 0.99, (name, shares)
