"""nepa-dist: distributed pretraining of vision transformers with NEPA (arXiv 2512.16922)."""

__version__ = "0.1.0"
