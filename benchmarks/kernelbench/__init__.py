"""Small modules in the file format of KernelBench (github.com/ScalingIntelligence/KernelBench), written here."""
