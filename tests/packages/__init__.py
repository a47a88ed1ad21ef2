"""The source distribution and the wheel, built and used as a user would: `make packages-tests`."""
