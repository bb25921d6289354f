"""What both sides of the comparison use."""

CHANNELS = {'slim': (128, 64, 32), 'full': (128, 128, 64)}
CLASSES, LATENT = 10, 100
NOISE = (0.5, 1.0)  # of the diversity loss, on means and on deviations
