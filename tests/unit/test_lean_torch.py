"""A worker does without torch's compiler, its distributed tensors and scipy; what it computes stays bit for bit."""

import json
import subprocess
import sys
from typing import Any

STEPS = """
import hashlib, json, sys
if {ordinary}:
    import worker.lean_torch
    worker.lean_torch.import_lean = lambda: None
from worker.tasks.causal_lm import CausalLM
import torch
from protocol import parameters
from protocol.run_spec import parse_run_spec
from worker.optimizers import build_optimizer

task, digests = CausalLM(), []
for model_spec in {models}:
    spec = parse_run_spec({{"model": model_spec, "data": {{"sequence_length": 16}}, "train": {{"optimizer": "muon"}}}})
    model = task.build_model(spec, 64, 0)
    optimizer = build_optimizer(model, spec.train)
    rows = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for _ in range(3):
        task.loss(model, rows).backward()
        optimizer.step(1e-3)
        optimizer.zero_grad()
    digests.append(hashlib.sha256(parameters.flatten(model).data).hexdigest())
names = ("scipy", "sympy", "torch._dynamo.eval_frame", "torch.distributed.tensor")
print(json.dumps([digests, [n in sys.modules for n in names]]))
"""
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MODELS = [
    {"architecture": "llama", "config": LLAMA},
    {"architecture": "gpt2", "config": {"n_embd": 32, "n_layer": 2, "n_head": 2}},
]
COMPILE = """
import json, sys
from worker.tasks import causal_lm
import torch

@torch.compiler.disable
def left_alone(x):
    return x.sum() if torch.compiler.is_compiling() else x * 2

@torch.compiler.assume_constant_result
def constant():
    return 3

deferred = "torch._dynamo.eval_frame" not in sys.modules and left_alone(torch.ones(2)).tolist() == [2.0, 2.0]
graphs = []

def count(graph, inputs):
    graphs.append(graph)
    return graph.forward

compiled = torch.compile(lambda x: left_alone(x + constant()) + 1, backend=count)
print(json.dumps([deferred, compiled(torch.ones(2)).tolist(), len(graphs), constant._dynamo_marked_constant]))
"""


def run_python(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_lean_import_leaves_out_what_is_not_used_and_changes_no_bit() -> None:
    lean, lean_modules = run_python(STEPS.format(ordinary=False, models=MODELS))
    ordinary, ordinary_modules = run_python(STEPS.format(ordinary=True, models=MODELS))
    assert lean_modules == [False, False, False, False]
    assert all(ordinary_modules)  # if not, there is nothing to leave out any more
    assert lean == ordinary


def test_whoever_compiles_gets_the_compiler_and_it_is_told_what_was_marked_before() -> None:
    assert run_python(COMPILE) == [True, [9.0, 9.0], 2, True]  # the disabled function parts the graph in two
