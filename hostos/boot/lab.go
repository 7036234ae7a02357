//go:build lab

package boot

// labServices are the services that only a lab image has.
func labServices() []Service {
	return []Service{{Name: "labhook", Args: []string{"/bbin/labhook"}}}
}
