package initramfs

import (
	"path"
	"slices"
	"strings"
	"testing"
)

func TestReleaseHasNoLab(t *testing.T) {
	for _, s := range []spec{hostSpec(Options{}), workSpec(Options{})} {
		if slices.Contains(s.tags, "lab") {
			t.Errorf("%s: build tag lab in a release image", s.name)
		}
		for _, c := range s.commands {
			if strings.Contains(c, "/lab") {
				t.Errorf("%s: %s in a release image", s.name, c)
			}
		}
	}
	for _, c := range hostSpec(Options{}).commands {
		if strings.HasPrefix(c, uroot) {
			t.Errorf("release host image has a tool that nobody calls: %s", c)
		}
	}
	for _, s := range []spec{hostSpec(Options{Lab: true}), workSpec(Options{Lab: true})} {
		if !slices.Contains(s.tags, "lab") || !slices.ContainsFunc(s.commands, func(c string) bool { return strings.Contains(c, "images/lab/cmd/") }) {
			t.Errorf("%s: lab image without its hook", s.name)
		}
	}
}

// TestAccounts: the files say what init does, who reads names from them finds
// the same users.
func TestAccounts(t *testing.T) {
	s := hostSpec(Options{})
	for file, lines := range map[string][]string{
		"/etc/passwd": {"root:x:0:0:root:/:/nologin", "netd:x:102:102::/:/nologin", "vmm:x:104:104::/:/nologin"},
		"/etc/group":  {"attestd:x:101:netd,logind", "linkd:x:103:netd", "vmm:x:104:", "notify:x:105:attestd,netd,linkd,logind"},
	} {
		for _, line := range lines {
			if !slices.Contains(strings.Split(string(s.files[file].data), "\n"), line) {
				t.Errorf("%s lacks %s:\n%s", file, line, s.files[file].data)
			}
		}
	}
}

func TestSpecs(t *testing.T) {
	for _, lab := range []bool{false, true} {
		for _, s := range []spec{hostSpec(Options{Lab: lab}), workSpec(Options{Lab: lab})} {
			names := map[string]bool{}
			for _, c := range s.commands {
				if names[path.Base(c)] {
					t.Errorf("%s: two commands named %s", s.name, path.Base(c))
				}
				names[path.Base(c)] = true
			}
			if !slices.Contains(s.commands, s.init) {
				t.Errorf("%s: %s is not among its commands", s.name, s.init)
			}
		}
	}
}
