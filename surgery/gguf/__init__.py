"""Write a checkpoint as one GGUF file, which llama.cpp runs."""
