package update

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"sekisho/attest/gate"
)

// TestGood: the counter is raised after the tunnel opened and not before, again
// after a fault that may pass, and not after a refusal.
func TestGood(t *testing.T) {
	for name, c := range map[string]struct {
		answers []error
		raised  bool
	}{
		"at once":       {[]error{nil}, true},
		"no disk yet":   {[]error{errors.New("no rollback counter"), &gate.KeyRefused{Detail: "closed"}, nil}, true},
		"an older one":  {[]error{&gate.KeyRefused{Codes: []string{gate.CodeRolledBack}, Detail: "older"}, nil}, false},
		"never answers": {[]error{errors.New("no attestd")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithCancel(t.Context())
				looks, asked, raised := 0, 0, false
				g := Good{
					Release: &Release{Version: "2", Epoch: 18, Raw: []byte("{}")},
					Look:    func(context.Context) Proof { looks++; return Proof{Good: looks > 3} },
					Raise: func(context.Context, gate.VolumeRequest) error {
						if looks <= 3 {
							t.Error("raised before the image was good")
						}
						err := c.answers[min(asked, len(c.answers)-1)]
						if asked++; asked > 5 {
							stop()
						}
						raised = err == nil
						return err
					},
					Say: func(string, ...any) {},
				}
				g.Watch(ctx)
				stop()
				if raised != c.raised {
					t.Errorf("raised %v after %d attempts", raised, asked)
				}
			})
		})
	}
}

func TestReadRelease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	if _, err := ReadRelease(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	for content, good := range map[string]bool{`{"image":"host","version":"2","epoch":17,"pcrs":{}}`: true, "x": false, string(bytes.Repeat([]byte(" "), maxRelease+1)): false} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := ReadRelease(path)
		if good != (err == nil) || good && (r.Version != "2" || r.Epoch != 17 || string(r.Raw) != content) {
			t.Errorf("%.20q: %+v, %v", content, r, err)
		}
	}
}

// flash is a partition whose power goes after some writes.
type flash struct {
	data []byte
	left int
}

var errPower = errors.New("power cut")

func (f *flash) ReadAt(b []byte, at int64) (int, error) { return copy(b, f.data[at:]), nil }

func (f *flash) WriteAt(b []byte, at int64) (int, error) {
	if f.left == 0 {
		return 0, errPower
	}
	f.left--
	return copy(f.data[at:], b), nil
}

// TestPowerCutInESP: a slot that is written over is whole, old or new, or has
// no file system at all, whichever write the power interrupts.
func TestPowerCutInESP(t *testing.T) {
	size := ESPSize(SmallCluster, 1<<20)
	write := func(f *flash, content byte) error {
		return WriteESP(f, 1<<20, size, SmallCluster, bytes.NewReader(bytes.Repeat([]byte{content}, 1<<20)), 1<<20, nil)
	}
	old, next := &flash{make([]byte, size), -1}, &flash{make([]byte, size), -1}
	if err := errors.Join(write(old, 'a'), write(next, 'b')); err != nil {
		t.Fatal(err)
	}
	bootable := func(d []byte) bool { return d[510] == 0x55 && d[511] == 0xaa }
	for cut := 0; ; cut++ {
		f := &flash{bytes.Clone(old.data), cut}
		err := write(f, 'b')
		if err == nil {
			if !bytes.Equal(f.data, next.data) {
				t.Error("a whole write leaves something of the old slot")
			}
			if cut < 8 {
				t.Errorf("a slot of %d writes", cut)
			}
			return
		}
		if !errors.Is(err, errPower) {
			t.Fatal(err)
		}
		if bootable(f.data) && !bytes.Equal(f.data, old.data) {
			t.Errorf("cut after %d writes: %s", cut, fmt.Sprint("neither the old slot nor none"))
		}
	}
}
