"""Model cards, as the files of this folder: `template.md` for a model of your own, one more for each release."""
