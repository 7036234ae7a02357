//go:build !lab

package work

// services of a work domain.
func services() []*service {
	return []*service{{args: []string{"/bbin/guestagent"}}}
}
