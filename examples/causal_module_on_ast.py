#!/usr/bin/env python
"""The causal loss on another backbone: transformers' Audio Spectrogram Transformer.

    python examples/causal_module_on_ast.py --data ../shared/data/esc10

Without `--model_name_or_path` a small AST starts from scratch, so nothing is downloaded. What is saved is an ordinary
AST: at inference it needs neither the causal module nor this package.
"""

import argparse

import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    TrainingArguments,
    set_seed,
)

from transformers_cat.causal import CausalModule
from transformers_cat.training import (
    AudioTrainer,
    compute_metrics_for,
    decode_audio,
    label_names,
    load_audio_dataset,
    split_folds,
)


def collator(extractor: ASTFeatureExtractor):
    """Waveforms and labels -> AST's `input_values` and labels."""

    def collate(rows: list[dict]) -> dict:
        audio = [row["audio"] for row in rows]
        batch = extractor(audio, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {"input_values": batch["input_values"], "labels": torch.tensor([row["label"] for row in rows])}

    return collate


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set with folds: ESC-50, UrbanSound8K or a CSV with folds")
    parser.add_argument("--test_fold", type=int, default=1)
    parser.add_argument("--model_name_or_path", help="an AST to fine-tune, as a folder or an id on the Hub")
    parser.add_argument("--causal_loss_weight", type=float, default=1.0, help="0 is AST alone")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--max_steps", type=int, default=-1, help="overrides the epochs")
    parser.add_argument("--output_dir", default="runs/ast")
    args = parser.parse_args(argv)

    set_seed(0)
    splits = split_folds(load_audio_dataset(args.data), test_folds=[args.test_fold])
    names = label_names(splits["train"])
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    labels["problem_type"] = "single_label_classification"
    if args.model_name_or_path:
        extractor = ASTFeatureExtractor.from_pretrained(args.model_name_or_path)
        ast = ASTForAudioClassification.from_pretrained(args.model_name_or_path, ignore_mismatched_sizes=True, **labels)
    else:
        extractor = ASTFeatureExtractor(max_length=512)  # frames of 10 ms: clips of 5 s
        ast = ASTForAudioClassification(
            ASTConfig(
                hidden_size=192,
                num_hidden_layers=4,
                num_attention_heads=3,
                intermediate_size=768,
                max_length=512,
                frequency_stride=16,
                time_stride=16,
                **labels,
            )
        )

    decoded = {name: decode_audio(split, extractor.sampling_rate) for name, split in splits.items()}
    trainer = AudioTrainer(
        CausalModule(ast, loss_weight=args.causal_loss_weight),
        TrainingArguments(
            args.output_dir,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=16,
            learning_rate=5e-4,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            logging_steps=0.05,
            save_strategy="no",
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            seed=0,
        ),
        data_collator=collator(extractor),
        eval_collator=collator(extractor),
        train_dataset=decoded["train"],
        compute_metrics=compute_metrics_for("single_label_classification"),
    )
    trainer.train()
    metrics = trainer.predict(decoded["test"]).metrics
    ast.save_pretrained(args.output_dir)
    extractor.save_pretrained(args.output_dir)
    print(f"accuracy {metrics['test_accuracy']:.3f} on {metrics['test_clips']} clips; saved in {args.output_dir}")
    return metrics


if __name__ == "__main__":
    main()
