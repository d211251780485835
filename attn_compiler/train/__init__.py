"""What a training loop needs beside the rewritten model."""
