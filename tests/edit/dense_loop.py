"""The closed loop as its formulas say it: one fact at a time, whole passes, autograd, dense matrices, fp64 solves."""

from __future__ import annotations

from contextlib import contextmanager

import plain
import torch


class DenseLoop:
    """A twin of an editor with AlphaEdit, SPHERE and the bare prompts; ``edit`` takes one batch.

    Args:
        covariances: ``{layer: [d, d]}`` of the keys, fp64.
    """

    def __init__(self, model, tokenizer, structure, config, covariances):
        self.model, self.tokenizer, self.structure, self.config = model, tokenizer, structure, config
        self.projectors, self.history, self.asked = {}, {}, []
        for layer in config.layers:
            values, vectors = torch.linalg.eigh(covariances[layer])
            basis = vectors[:, values < config.null_space_threshold]
            self.projectors[layer], self.history[layer] = basis @ basis.T, torch.zeros_like(covariances[layer])

    def edit(self, facts):
        """``{layer: Δ [n, d]}`` of a batch, fp64, which is then in the weights and the history."""
        c, root = self.config, len(self.config.layers) ** 0.5
        delta = {layer: torch.zeros_like(self._weight(layer), dtype=torch.float64) for layer in c.layers}
        essence = [self._essence(fact, delta).detach() for fact in facts]
        known, before = [False] * len(facts), [float("inf")] * len(facts)
        caution, keys = [1.0] * len(facts), {layer: [None] * len(facts) for layer in c.layers}
        wanted = {layer: [0.0] * len(facts) for layer in c.layers}
        direction = {layer: [0.0] * len(facts) for layer in c.layers}
        unit = None
        for round_number in range(c.loop_rounds):
            seen = [None if known[i] else self._pass(fact, delta, essence[i]) for i, fact in enumerate(facts)]
            if unit is None:
                unit = {m: sum(s.outputs[m].norm() for s in seen) / len(facts) / root for m in c.layers}
            for i, s in enumerate(seen):
                if s is None:
                    continue
                for layer in c.layers:
                    keys[layer][i] = s.keys[layer]
                known[i] = s.nll < c.loop_stop
                if known[i]:
                    continue
                caution[i] *= 0.5 if s.nll > before[i] else 1.0
                before[i] = s.nll
                slope = sum(s.gradients[m].norm() * unit[m] for m in c.layers)
                step = caution[i] * min(c.loop_step, c.loop_reach * (s.nll - c.loop_stop / 2) / slope)
                for m in c.layers:
                    g = s.gradients[m]
                    direction[m][i] = c.loop_momentum * direction[m][i] + g / g.norm()
                    wanted[m][i] = wanted[m][i] - step * unit[m] * direction[m][i]
            if all(known) and round_number:
                break
            for m in c.layers:
                k = torch.stack(keys[m])
                v = torch.stack([torch.zeros_like(delta[m][:, 0]) + w for w in wanted[m]])
                solved = plain.alphaedit(self.projectors[m], self.history[m], c.ridge, k, v)
                delta[m] = solved - c.alpha * solved @ plain.principal_projector(self._weight(m), c.energy_ratio)
            self.asked.append(wanted)
        for m in c.layers:
            self._weight(m).copy_((self._weight(m).double() + delta[m]).to(self._weight(m).dtype))
        for m in c.layers:
            found = [self._key(fact, m) for fact in facts]
            self.history[m] = self.history[m] + sum(torch.outer(k, k) for k in found)
        return delta

    def _weight(self, layer):
        return self.structure.edited[layer].weight

    def _row(self, fact):
        ids, at = plain.subject_last(self.tokenizer, fact.prompt, fact.subject)
        whole = self.tokenizer(f"{fact.text} {fact.target_new}")["input_ids"]
        assert whole[: len(ids)] == ids
        return whole, len(ids), at

    def _pass(self, fact, delta, essence):
        """Loss, keys, outputs and gradients under the weights and ``delta``, at the subject's last token."""
        seen = _Seen()
        whole, prompt, at = self._row(fact)
        with self._written(delta, at, seen):
            log_probs = self.model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
        nll = -torch.stack([log_probs[i - 1, whole[i]] for i in range(prompt, len(whole))]).mean()
        seen.gradients = dict(zip(seen.added, torch.autograd.grad(nll, list(seen.added.values())), strict=True))
        if self.config.loop_kl:
            about = _Seen()
            now = self._essence(fact, delta, about)
            kl = self.config.loop_kl * (now.exp() * (now - essence)).sum()
            for layer, g in zip(about.added, torch.autograd.grad(kl, list(about.added.values())), strict=True):
                seen.gradients[layer] = seen.gradients[layer] + g
        seen.gradients = {layer: g.double() for layer, g in seen.gradients.items()}
        seen.nll = float(nll.detach())
        return seen

    def _essence(self, fact, delta, seen=None):
        """Log-probabilities at the subject's last token of "{subject} is a"."""
        ids, at = plain.subject_last(self.tokenizer, "{} is a", fact.subject)
        with self._written(delta, at, _Seen() if seen is None else seen):
            return self.model(torch.tensor([ids[: at + 1]]), use_cache=False).logits[0, at].double().log_softmax(-1)

    @contextmanager
    def _written(self, delta, at, seen):
        """``delta`` acts from the subject's last token on: tokens before it are the batch before's."""

        def hook(layer):
            def act(_, args, out):
                given = args[0].reshape(1, -1, args[0].shape[-1])
                whole = out.reshape(1, given.shape[1], -1).clone()
                whole[:, at:] = whole[:, at:] + (given[:, at:].double() @ delta[layer].T).to(out.dtype)
                seen.keys[layer], seen.outputs[layer] = given[0, at].detach().double(), whole[0, at].detach().double()
                seen.added[layer] = torch.zeros_like(whole[0, at], requires_grad=True)
                whole[:, at] = whole[:, at] + seen.added[layer]
                return whole.reshape(out.shape)

            return act

        maps = [self.structure.edited[layer] for layer in delta]
        handles = [m.module.register_forward_hook(hook(m.layer)) for m in maps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _key(self, fact, layer):
        whole, _, at = self._row(fact)
        seen = {}
        module = self.structure.edited[layer].module
        handle = module.register_forward_pre_hook(lambda _, args: seen.update(key=args[0]))
        self.model(torch.tensor([whole]), use_cache=False)
        handle.remove()
        return seen["key"].reshape(len(whole), -1)[at].double()


class _Seen:
    def __init__(self):
        self.nll, self.keys, self.outputs, self.added, self.gradients = 0.0, {}, {}, {}, {}
