"""What libraries say that a user can do nothing about does not reach the terminal."""

import subprocess
import sys

SCRIPT = """
import logging, sys
import torch
from torch import nn
import scconv_deploy

class Loud(nn.Module):
    def forward(self, x):
        logging.disable(logging.NOTSET)  # a framework that sets logging up again
        return x * 2

if __name__ == "__main__":
    scconv_deploy.export(Loud().eval(), torch.ones(2, 3), sys.argv[1])
"""


def test_an_export_writes_nothing_of_its_own_to_stderr(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "m.onnx"], capture_output=True, text=True, timeout=300, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "m.onnx").stat().st_size > 0
