"""Take the last batches of a run back, go on, stop in the middle, and resume to the same bits; on a small random model.

Run: python examples/stop_and_resume.py
"""

import hashlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from sphere_edit import load_model

work = Path(tempfile.mkdtemp(prefix="sphere-edit-example-"))
tokenizer = load_model("smollm2-135m")[1]
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(work / "model")
tokenizer.save_pretrained(work / "model")
(work / "text.txt").write_text("The river was low in autumn, and boats lay on the sand. " * 50)

SPHERE_EDIT = [sys.executable, "-m", "sphere_edit"]  # the command sphere-edit
RUN = [*SPHERE_EDIT, "run", "--model", work / "model", "--data", "world-facts", "--limit", "32", "--batch-size", "1"]
RUN += ["--covariance-text", work / "text.txt", "--perplexity-text", work / "text.txt", "--score-sample", "4"]


def kept(run: Path) -> int:
    return len(list((run / "batches").glob("*.safetensors")))


def digest(run: Path) -> str:
    """All edited weights, before and after, in 16 digits."""
    return hashlib.sha256((run / "deltas.safetensors").read_bytes()).hexdigest()[:16]


def call(*command) -> None:
    subprocess.run(command, check=True, capture_output=True)


run = work / "run"
call(*RUN, "--out", run)
print(f"to the end: {kept(run)} batches, {digest(run)}")

call(*SPHERE_EDIT, "rollback", run, "--to-batch", "1")
print(f"rolled back: {kept(run)} batch kept")

resume = [*SPHERE_EDIT, "run", "--resume", run]
process = subprocess.Popen(resume, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while process.poll() is None and kept(run) < 3:
    time.sleep(0.01)
process.send_signal(signal.SIGINT)  # as Ctrl-C; a kill or a power cut would do as well
print(f"stopped: status {process.wait()}, {kept(run)} batches kept")

call(*resume)
print(f"resumed: {kept(run)} batches, {digest(run)}")
print(f"report: {run / 'report.html'}")
