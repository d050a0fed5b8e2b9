"""A folder as Hugging Face has it: model.onnx beside tokenizer.json, text in.

Needs: pip install tokenizers.

With a folder of your own only the last line is left; this makes one of a tiny BERT.
"""

from pathlib import Path

import onnx
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import onnx_ecp

folder = Path("bert")
folder.mkdir(exist_ok=True)
model = onnx.load("tests/fixtures/bert-dynamo.onnx")
names = {"ids": "input_ids", "mask": "attention_mask"}  # as Hugging Face calls them
for node in model.graph.node:
    node.input[:] = [names.get(name, name) for name in node.input]
for value in model.graph.input:
    value.name = names[value.name]
onnx.save(model, folder / "model.onnx")
lines = [line for line in Path("README.md").read_text("utf-8").splitlines() if line.strip()][:64]
(folder / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
special = ["[UNK]", "[PAD]"]
trainer = trainers.BpeTrainer(vocab_size=24, limit_alphabet=20, special_tokens=special)
tokenizer.train_from_iterator(lines, trainer)
tokenizer.save(str(folder / "tokenizer.json"))

result = onnx_ecp.optimize(folder / "model.onnx", folder / "texts.txt", sparsity=0.5)
print(f"{result.report.zeros_after} zeros, output error {result.report.gap.relative_error:.4f}")
