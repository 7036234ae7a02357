//go:build !lab

package boot

// labServices is empty: a release image has no lab hook.
func labServices() []Service { return nil }
