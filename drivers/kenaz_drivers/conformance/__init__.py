"""The checks that every driver passes, ours and others': what the engine relies on beyond the types.

    pytest --pyargs kenaz_drivers.conformance --kenaz-driver NAME

runs them over one installed driver; docs/how-to/write-a-driver.md says more.
"""
