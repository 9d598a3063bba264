# Under SECATEUR_DATA: cifar10/ with images, labels and weights (docs/reference/weights.md). About six minutes.
secateur run pipeline/runs/cifar10-resnet20.yaml --set threads=1 --set search.images=300 --set search.method=global \
  --set 'search.options={}' --set finetune.epochs=0.1 --set finetune.lr=0.005 --set report.pictures=false
