"""Folders of language models, as Hugging Face and ONNX Runtime GenAI load them: in and out."""

from morphgraph.folders.found import (
    ModelFolder as ModelFolder,
    folder_of as folder_of,
    model_file as model_file,
)
from morphgraph.folders.write import check_folder as check_folder, write_folder as write_folder
