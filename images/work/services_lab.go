//go:build lab

package work

// services of a work domain in the lab: labguest runs the lab's commands.
func services() []*service {
	return []*service{{args: []string{"/bbin/guestagent"}}, {args: []string{"/bbin/labguest", "serve"}}}
}
