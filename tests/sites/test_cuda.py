"""Every method on a CUDA device: the logits of the CPU, gradients, and text with a cache."""

from __future__ import annotations

import pytest
import torch

from tests.contract.subjects import CASES, Subject

KINDS = ("bert", "gpt2", "llama", "gemma2", "t5", "vit")


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "family"), [case for case in CASES if case[1] in KINDS])
def test_a_device_answers_and_learns_as_the_cpu_does(method: str, family: str) -> None:
    subject = Subject.of(method, family)
    subject.attach()
    model, kind, batch = subject.model, subject.family, subject.labelled()
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        output = model(**{name: value.to(device) for name, value in batch.items()})
        output.loss.backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        found.append((output.logits.detach().cpu(), grads))
    (logits, grads), (on_device, grads_there) = found
    torch.testing.assert_close(on_device, logits, atol=2e-4, rtol=2e-3)
    assert grads.keys() == grads_there.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grads_there[name], grad, atol=1e-3, rtol=1e-2)
    if kind.generates:
        ids = {k: v.to("cuda") for k, v in subject.inputs.items() if "decoder" not in k}
        cached, plain = (
            model.eval().generate(**ids, max_new_tokens=4, do_sample=False, use_cache=use)
            for use in (True, False)
        )
        assert torch.equal(cached, plain)
