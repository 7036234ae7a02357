//go:build !lab

package boot

import "testing"

func TestReleaseHasNoLabService(t *testing.T) {
	for _, s := range Services("") {
		if s.Name == "labhook" || s.User == "" {
			t.Errorf("a release starts %s", s.Name)
		}
	}
}
