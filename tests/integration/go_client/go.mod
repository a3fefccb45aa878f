module kenaz.dev/tests/go_client

go 1.19
