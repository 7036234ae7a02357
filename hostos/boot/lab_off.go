//go:build !lab

package boot

// labServices and labDevices do nothing: a release image has no lab hook.
func labServices() []Service { return nil }

func labDevices() error { return nil }
