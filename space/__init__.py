"""The Gradio app and what a Space of Hugging Face needs beside it. `refalign push-space` sends these files."""
