package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/store"
)

// desk is a disk whose programs and attestd are simulated: the header is bound
// by its digest, and the key opens by it alone.
type desk struct {
	*Disk
	t      *testing.T
	bound  attest.Digest
	refuse *gate.KeyRefused
	away   int // answers before the verifier takes the recovery key
	lost   int // answers of an attestd that was started anew
	binds  func()
	cut    int // programs that run before the power goes; -1: it stays
	ran    []string
	said   []string
}

// daemon is attestd.
type daemon struct{ *desk }

var errCut = errors.New("power cut")

const (
	theKey      = "a key that nobody may see......."
	theRecovery = "000011-000022"
)

func (d daemon) Unlock(_ context.Context, r gate.UnlockRequest) ([]byte, error) {
	switch {
	case d.refuse != nil:
		return nil, d.refuse
	case r.Header != d.bound:
		return nil, &gate.KeyRefused{Codes: []string{gate.CodeHeader}, Detail: "another header"}
	}
	return []byte(theKey), nil
}

func (d daemon) NewVolume(context.Context, gate.VolumeRequest) (gate.NewVolume, error) {
	return gate.NewVolume{ID: []byte("id"), Key: []byte(theKey), Recovery: theRecovery}, nil
}

func (d daemon) BindVolume(_ context.Context, r gate.BindRequest) ([]byte, error) {
	if d.binds != nil {
		d.binds()
	}
	if d.away > 0 {
		d.away--
		return nil, fmt.Errorf("%w: no verifier", gate.ErrNotEscrowed)
	}
	if d.lost > 0 {
		if d.lost--; d.lost > 0 {
			return nil, errors.New("connection refused")
		}
		return nil, &gate.KeyRefused{Detail: "none in the making"}
	}
	d.bound = r.Header
	return []byte("volume"), nil
}

func (d daemon) Recover(_ context.Context, r gate.RecoverRequest) (gate.RecoverResponse, error) {
	if r.Recovery != theRecovery {
		return gate.RecoverResponse{}, &gate.KeyRefused{Codes: []string{gate.CodeRecovery}, Detail: "wrong"}
	}
	return gate.RecoverResponse{Key: []byte(theKey), Volume: []byte("sealed anew")}, nil
}

// run does what cryptsetup and dmsetup would, as far as a file can.
func (d *desk) run(_ context.Context, stdin []byte, argv ...string) error {
	if d.cut == 0 {
		return errCut
	}
	d.cut--
	if strings.Contains(strings.Join(argv, " "), theKey) {
		d.t.Error("the key is among the arguments")
	}
	d.ran = append(d.ran, filepath.Base(argv[0])+" "+argv[1])
	work := filepath.Join(d.Mapper, workName)
	switch {
	case argv[1] == "luksFormat":
		return overwrite(d.Partition, append([]byte("LUKS\xba\xbe"), stdin...))
	case argv[1] == "open" && slices.Contains(argv, workName):
		if string(stdin) != theKey {
			return errors.New("no key available with this passphrase")
		}
		return os.WriteFile(work, nil, 0o600)
	}
	return nil
}

func overwrite(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	return errors.Join(err, f.Close())
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	dir := t.TempDir()
	d := &desk{t: t, cut: -1}
	c := Config{
		Partition: filepath.Join(dir, "work"), Factory: filepath.Join(dir, "factory"), Scratch: filepath.Join(dir, "scratch"), Mapper: dir + "/mapper",
		Record: store.Record{Path: filepath.Join(dir, "host")}, Release: filepath.Join(dir, "release.json"),
		Keys: daemon{d}, Run: d.run, Now: time.Now,
		Say: func(format string, a ...any) { d.said = append(d.said, fmt.Sprintf(format, a...)) },
	}
	if err := os.Mkdir(c.Mapper, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, content := range map[string][]byte{
		c.Partition: make([]byte, HeaderSize+4096), c.Factory: []byte("delivered"), c.Record.Path: make([]byte, store.Size), c.Release: []byte("{}"),
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.Disk = New(c)
	return d
}

// again is the next boot.
func (d *desk) again() { d.Disk, d.cut, d.ran, d.said = New(d.Config), -1, nil, nil }

func (d *desk) mustOpen() {
	d.t.Helper()
	if _, err := d.Open(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
	if s := d.Status(); s.State != Open {
		d.t.Errorf("status %+v", s)
	}
}

func (d *desk) mustNotOpen(code string) {
	d.t.Helper()
	_, err := d.Open(d.t.Context())
	var f *Fault
	if !errors.As(err, &f) || !slices.Contains(f.Codes, code) {
		d.t.Fatalf("%v, want %s", err, code)
	}
	if s := d.Status(); s.State == Open || !slices.Contains(s.Codes, code) {
		d.t.Errorf("status %+v", s)
	}
	if w := f.Words(); !strings.Contains(w, code) || !strings.Contains(w, "業務ディスク") {
		d.t.Errorf("words %q", w)
	}
}

func TestFirstBootAndNext(t *testing.T) {
	d := newDesk(t)
	d.away = 1
	d.mustOpen()
	if got, err := os.ReadFile(filepath.Join(d.Mapper, workName)); err != nil || string(got) != "delivered" {
		t.Errorf("on the disk: %q, %v", got, err)
	}
	if n := strings.Count(strings.Join(d.said, "\n"), theRecovery); n != 1 {
		t.Errorf("the recovery key was shown %d times: %q", n, d.said)
	}
	d.again()
	d.mustOpen()
	if want := []string{"cryptsetup open"}; !slices.Equal(d.ran, want) || len(d.said) > 0 {
		t.Errorf("the second boot ran %q and said %q", d.ran, d.said)
	}
}

// TestAttestdStartedAnew: an attestd that lost the volume in the making has it
// made again, in the same boot.
func TestAttestdStartedAnew(t *testing.T) {
	d := newDesk(t)
	d.lost = 2
	d.mustOpen()
	if want := []string{"cryptsetup luksFormat", "cryptsetup open", "cryptsetup close", "cryptsetup luksFormat", "cryptsetup open"}; !slices.Equal(d.ran, want) {
		t.Errorf("ran %q", d.ran)
	}
	if n := strings.Count(strings.Join(d.said, "\n"), theRecovery); n != 1 {
		t.Errorf("the recovery key was shown %d times", n)
	}
}

// TestPowerCuts: whatever the power interrupts, the next boot ends with a disk
// and its recovery key shown.
func TestPowerCuts(t *testing.T) {
	for cut := range 3 {
		d := newDesk(t)
		d.cut = cut
		_, err := d.Open(t.Context())
		if cut < 2 != errors.Is(err, errCut) {
			t.Fatalf("cut after %d programs: %v", cut, err)
		}
		d.again()
		d.mustOpen()
		if shown := strings.Contains(strings.Join(d.said, ""), theRecovery); shown != (cut < 2) {
			t.Errorf("cut after %d programs: recovery key shown %v", cut, shown)
		}
	}
}

func TestStaysLocked(t *testing.T) {
	d := newDesk(t)
	d.mustOpen()

	for _, code := range []string{gate.CodeImage, gate.CodeSecureBoot, gate.CodeUsed, gate.CodeRolledBack, gate.CodeOtherTPM, gate.CodeRefused} {
		d.again()
		d.refuse = &gate.KeyRefused{Codes: []string{code}, Detail: "x"}
		d.mustNotOpen(code)
		if len(d.ran) > 0 {
			t.Errorf("%s: ran %q", code, d.ran)
		}
	}
	d.refuse = nil

	// The recovery key opens it, and the seal is renewed.
	if _, err := d.Recover(t.Context(), "000033"); err == nil {
		t.Error("a wrong recovery key opened the disk")
	}
	if _, err := d.Recover(t.Context(), theRecovery+"\n"); err != nil {
		t.Error(err)
	}
	if r, err := d.load(); err != nil || string(r.Volume) != "sealed anew" {
		t.Errorf("record %+v, %v", r, err)
	}

	// Another header: by attestd, before anything is opened.
	d.again()
	if err := overwrite(d.Partition, []byte("LUKS\xba\xbeof another")); err != nil {
		t.Fatal(err)
	}
	d.mustNotOpen(gate.CodeHeader)

	// A volume without a record is never made anew.
	d.again()
	if err := os.WriteFile(d.Config.Record.Path, make([]byte, store.Size), 0o600); err != nil {
		t.Fatal(err)
	}
	d.mustNotOpen(codeRecord)
	if err := os.Remove(d.Release); err != nil {
		t.Fatal(err)
	}
	d.mustNotOpen(gate.CodePolicy)
}

func TestWipe(t *testing.T) {
	d := newDesk(t)
	d.mustOpen()
	before, err := d.head()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Wipe(); err != nil {
		t.Fatal(err)
	}
	after, err := d.head()
	if err != nil || bytes.Equal(before, after) || sha256.Sum256(after) == d.bound {
		t.Errorf("the header is still there, %v", err)
	}
	if host, err := os.ReadFile(d.Config.Record.Path); err != nil || bytes.Contains(host, []byte("dm9sdW1l")) { // "volume"
		t.Errorf("the sealed key is still there, %v", err)
	}
	d.again()
	d.mustNotOpen(codeWiped)
	if d.Status().State != Wiped {
		t.Errorf("status %+v", d.Status())
	}
	if _, err := d.Recover(t.Context(), theRecovery); err == nil {
		t.Error("the recovery key opened a wiped disk")
	}
}

// TestWipeCutShort: an order to wipe that the power cut short after its first
// write is carried out by the next boot.
func TestWipeCutShort(t *testing.T) {
	d := newDesk(t)
	d.mustOpen()
	if err := d.store(record{State: recordWiped}); err != nil {
		t.Fatal(err)
	}
	ordered, err := d.load()
	if err != nil {
		t.Fatal(err)
	}
	d.again()
	d.mustNotOpen(codeWiped)
	if head, err := d.head(); err != nil || sha256.Sum256(head) == d.bound {
		t.Errorf("the header is still there, %v", err)
	}
	if host, err := os.ReadFile(d.Config.Record.Path); err != nil || bytes.Contains(host, []byte("dm9sdW1l")) {
		t.Errorf("the sealed key is still there, %v", err)
	}
	if r, err := d.load(); err != nil || !r.Since.Equal(ordered.Since) {
		t.Errorf("%+v, ordered at %v, %v", r, ordered.Since, err)
	}
}

// TestWipeDoesNotWait: neither for a verifier that does not come nor for an
// attestd that does not answer.
func TestWipeDoesNotWait(t *testing.T) {
	d := newDesk(t)
	d.away = 1 << 30
	waiting := make(chan struct{})
	d.binds = sync.OnceFunc(func() { close(waiting) })
	opened := make(chan error, 1)
	go func() { _, err := d.Open(context.WithoutCancel(t.Context())); opened <- err }()
	<-waiting
	if err := d.Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err == nil {
		t.Error("opened")
	}
	if s := d.Status(); s.State != Wiped {
		t.Errorf("status %+v", s)
	}
	d.mustNotOpen(codeWiped)
}

func TestEphemeral(t *testing.T) {
	d := newDesk(t)
	d.mustOpen()
	d.again()
	d.Ephemeral = true
	if got, err := d.Open(t.Context()); err != nil || filepath.Base(got) != layerName {
		t.Fatalf("%q, %v", got, err)
	}
	if want := []string{"cryptsetup open", "cryptsetup open", "dmsetup create"}; !slices.Equal(d.ran, want) {
		t.Errorf("ran %q", d.ran)
	}
}
