package boot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	"sekisho/attest"
	"sekisho/attest/gate"
)

func TestWorkEvent(t *testing.T) {
	a, err := workEvent([]string{"qemu", "-a b"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := workEvent([]string{"qemu", "-a", "b"})
	if err != nil {
		t.Fatal(err)
	}
	if a == b || a.Kind != attest.EventWorkDomain {
		t.Errorf("%v, %v", a, b)
	}
}

// records fails with its errors, one call each, then succeeds.
type records struct {
	errs  []error
	calls int
}

func (r *records) Record(context.Context, attest.RunEvent) error {
	r.calls++
	if r.calls <= len(r.errs) {
		return r.errs[r.calls-1]
	}
	return nil
}

func TestMeasureTriesAgain(t *testing.T) {
	starting := errors.New("attestd is starting")
	for name, c := range map[string]struct {
		errs  []error
		calls int
		want  error
	}{
		"at once":    {nil, 1, nil},
		"late":       {[]error{starting, starting}, 3, nil},
		"no log":     {[]error{starting, gate.ErrNoEvents}, 2, gate.ErrNoEvents},
		"never ever": {slices.Repeat([]error{starting}, 2*int(measureLimit/measureWait)), int(measureLimit / measureWait), starting},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &records{errs: c.errs}
				if err := measure(t.Context(), r, attest.RunEvent{}); !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if r.calls < c.calls || r.calls > c.calls+1 {
					t.Errorf("%d calls, want %d", r.calls, c.calls)
				}
			})
		})
	}
}

func TestMakeEventsNeverTakesAnExistingFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := makeEvents(path); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
}
