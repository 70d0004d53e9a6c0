"""Manifests of every kind: tables, tars, the lists of VGGSound and AudioSet."""
