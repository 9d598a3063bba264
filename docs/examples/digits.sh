# About ten minutes on two busy cores. It needs nothing but the package.
secateur run pipeline/runs/digits.yaml --set threads=1 --set 'precision=[fp32, int8]' --set device.sustain_s=30 \
  --set report.sensitivity=true
