"""Where suites come from: the ImageNet family, the digits, a YAML file of one's own."""
