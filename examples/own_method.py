"""A method of one's own, from Python and from the shell; the method itself is in mymethods/capped.py.

Run: python examples/own_method.py

The same method from the shell, in the folder that holds ``mymethods``::

    cd examples
    sphere-edit run --method mymethods.capped:CappedRidge --set cap=0.006 --data world-facts --limit 20 --out capped

A settings file may name a method, too, but its code runs only if you say so: ``--trust-remote-code``.
"""

from mymethods.capped import CappedRidge  # the name alone, as in a file of settings, would run no code

from sphere_edit import SphereEditor, load_model, load_requests, preset

model, tokenizer = load_model("smollm2-135m")
name = f"{CappedRidge.__module__}:{CappedRidge.__name__}"  # mymethods.capped:CappedRidge
config = preset("smollm2-135m").replace(method=name, cap=0.006, batch_size=2)
editor = SphereEditor(model, tokenizer, config)
before = editor.original_weights()
result = editor.edit(load_requests("world-facts", limit=4))

for layer, weight in editor.weights().items():
    share = float((weight - before[layer]).norm() / before[layer].norm())
    print(f"layer {layer}: moved by {share:.2%} of its norm in {editor.batches} batches")
for request in result.requests:
    ids = tokenizer(request.text, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=4, do_sample=False)
    print(f"wanted {request.target_new!r}: {tokenizer.decode(written[0])!r}")
