"""Edit one fact of SmolLM2-135M, ask for it, and take the edit back bit for bit.

Run: python examples/one_edit.py    (the first run converts the model and measures its keys: a minute or two)
"""

import torch

from sphere_edit import SphereEditor, load_model

FACT = {"prompt": "The capital of {} is", "subject": "Mali", "target_new": "Lisbon", "target_true": "Bamako"}

model, tokenizer = load_model("smollm2-135m")
before = {name: weight.clone() for name, weight in model.state_dict().items()}


def show(when: str) -> None:
    ids = tokenizer(FACT["prompt"].format(FACT["subject"]), return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=5, do_sample=False)
    changed = sum(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    print(f"{when}: {tokenizer.decode(written[0])!r}, {changed} weights changed")


editor = SphereEditor(model, tokenizer, "smollm2-135m")  # a preset; an EditConfig says anything else
show("before")
editor.edit([FACT])
show("edited")
editor.revert()
show("reverted")
