module kenaz.dev/tests/harness_vm

go 1.19
