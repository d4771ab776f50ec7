"""Networks: the architecture, its registration in timm, detectors and segmenters over it."""
