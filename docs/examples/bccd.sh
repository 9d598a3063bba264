# Under SECATEUR_DATA: bccd/ and weights/detection/ (docs/how-to/detection.md). About twenty minutes on two busy cores.
secateur run pipeline/runs/bccd-ssd300.yaml --set threads=1 --set search.images=20 --set baseline.epochs=1 \
  --set finetune.epochs=1 --set baseline.warmup_epochs=0.2 --set finetune.warmup_epochs=0.2 \
  --set search.options.criterion=l1 --set gate.max_drop=0.2
