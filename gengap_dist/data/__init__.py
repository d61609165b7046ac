"""Data sets in memory or on disk, the order of samples, and batches."""

TORCHVISION = {  # name: torchvision class, folder in data.root
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
}
