"""How a network is trained: the LightningModule, optimiser, exact resume, several processes."""
