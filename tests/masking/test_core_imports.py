import subprocess
import sys

BLOCKED = ["open_clip", "timm", "torchvision", "webdataset", "ot", "PIL", "numpy", "pandas"]
PROGRAM = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import clip_pgs, torch
inputs = clip_pgs.PatchInputs(torch.rand(1, 3, 32, 32), 8)
print(clip_pgs.create_masking("pgs")(inputs).index.shape[1])
"""


def test_the_core_imports_and_runs_with_torch_alone():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8"
