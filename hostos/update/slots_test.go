package update

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/store"
)

// program is a UEFI program of that many bytes, as far as section looks: one
// section .pcrsig, and a signature if it is signed.
func program(policy string, size int, fill byte, signed bool) []byte {
	le := binary.LittleEndian
	b := bytes.Repeat([]byte{fill}, size)
	clear(b[:1024])
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 64)
	copy(b[64:], "PE\x00\x00")
	le.PutUint16(b[64+6:], 1)
	le.PutUint16(b[64+20:], 240)
	if signed {
		le.PutUint32(b[64+24+144+4:], 8)
	}
	at := 64 + 24 + 240
	copy(b[at:], ".pcrsig")
	le.PutUint32(b[at+8:], uint32(len(policy)))
	le.PutUint32(b[at+16:], 512)
	le.PutUint32(b[at+20:], 512)
	copy(b[512:], policy)
	return b
}

// laptop is a disk with two slots, firmware variables and a record, all of
// which lose power after some writes.
type laptop struct {
	slots   map[Slot]*slotFile
	vars    map[string][]byte
	record  []byte
	counter uint64
	left    int // writes until the power goes; negative: never
	writes  int
}

func (l *laptop) write() error {
	if l.left == 0 {
		return errPower
	}
	l.left--
	l.writes++
	return nil
}

type slotFile struct {
	*os.File
	l *laptop
}

func (s *slotFile) WriteAt(b []byte, at int64) (int, error) {
	if err := s.l.write(); err != nil {
		// The write that the power interrupts gets half way, in whole sectors.
		s.File.WriteAt(b[:len(b)/2/sector*sector], at)
		return 0, err
	}
	return s.File.WriteAt(b, at)
}
func (s *slotFile) Sync() error  { return nil }
func (s *slotFile) Close() error { return nil }

func (l *laptop) Get(name string) ([]byte, error) {
	if v, ok := l.vars[name]; ok {
		return v, nil
	}
	return nil, fs.ErrNotExist
}

func (l *laptop) Set(name string, data []byte) error {
	if err := l.write(); err != nil {
		return err
	}
	if len(data) == 0 {
		delete(l.vars, name)
	} else {
		l.vars[name] = bytes.Clone(data)
	}
	return nil
}

func (l *laptop) Entries() (list []uint16, err error) {
	for name := range l.vars {
		var n uint16
		if _, err := fmt.Sscanf(name, "Boot%04X", &n); err == nil {
			list = append(list, n)
		}
	}
	return list, nil
}

func (l *laptop) Load() ([]byte, error) {
	if l.record == nil {
		return nil, store.ErrNone
	}
	return l.record, nil
}

func (l *laptop) Store(b []byte) error {
	if err := l.write(); err != nil {
		return err
	}
	l.record = bytes.Clone(b)
	return nil
}

const slotBytes = leastClusters*Cluster + 6*mib

func newLaptop(t *testing.T) *laptop {
	l := &laptop{slots: map[Slot]*slotFile{}}
	for _, s := range Both() {
		f, err := os.Create(filepath.Join(t.TempDir(), string(s)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		l.slots[s] = &slotFile{f, l}
	}
	return l
}

// install is the laptop as it was delivered, with image in slot a.
func (l *laptop) install(t *testing.T, image []byte) {
	t.Helper()
	*l = laptop{slots: l.slots, vars: map[string][]byte{"BootOrder": {9, 0}, "Boot0009": []byte("another")}, left: -1}
	for _, s := range l.slots {
		if err := errors.Join(s.Truncate(0), s.Truncate(slotBytes)); err != nil {
			t.Fatal(err)
		}
	}
	if err := WriteESP(l.slots[SlotA], 0, slotBytes, Cluster, bytes.NewReader(image), int64(len(image)), nil); err != nil {
		t.Fatal(err)
	}
}

func (l *laptop) places() map[Slot]Place {
	return map[Slot]Place{
		SlotA: {1, 2048, slotBytes / sector, [16]byte{1}},
		SlotB: {2, 2048 + slotBytes/sector, slotBytes / sector, [16]byte{2}},
	}
}

// content is what the firmware finds in a slot; nil without a file system.
func (l *laptop) content(t *testing.T, s Slot) []byte {
	t.Helper()
	f, le := l.slots[s].File, binary.LittleEndian
	read := func(at int64, n int) []byte {
		b := make([]byte, n)
		if _, err := f.ReadAt(b, at); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		return b
	}
	bs := read(0, sector)
	if bs[510] != 0x55 || bs[511] != 0xaa {
		return nil
	}
	data := (int64(le.Uint16(bs[14:])) + 2*int64(le.Uint32(bs[36:]))) * sector
	e := read(data+2*Cluster+64, 32)
	if string(e[:11]) != "BOOTX64 EFI" {
		t.Fatalf("slot %s: a file system without its file: %q", s, e)
	}
	return read(data+int64(le.Uint16(e[26:])-2)*Cluster, int(le.Uint32(e[28:])))
}

// firmware starts a slot as UEFI does: BootNext once, then BootOrder, then the
// first that can be started. Only a whole image is.
func (l *laptop) firmware(t *testing.T, whole func([]byte) bool) (s Slot, attempts int) {
	t.Helper()
	var tries []Slot
	slot := func(n uint16) {
		for s, p := range l.places() {
			if bytes.Equal(l.vars[entryName(n)], p.loadOption(s)) {
				tries = append(tries, s)
				return
			}
		}
	}
	if next := l.vars["BootNext"]; len(next) == 2 {
		slot(binary.LittleEndian.Uint16(next))
		delete(l.vars, "BootNext")
	}
	for order := l.vars["BootOrder"]; len(order) >= 2; order = order[2:] {
		slot(binary.LittleEndian.Uint16(order))
	}
	for i, s := range append(tries, Both()...) {
		if c := l.content(t, s); c != nil && !whole(c) {
			t.Errorf("slot %s holds neither image whole", s)
		} else if c != nil {
			return s, i + 1
		}
	}
	t.Fatal("nothing starts")
	return
}

func (l *laptop) begin(running Slot, attempts int) (*Slots, Action, error) {
	return Begin(Config{Running: running, Attempts: attempts, Places: l.places(), Block: sector, Vars: l, Keep: l, Now: time.Now,
		Open: func(s Slot) (Device, error) { return l.slots[s], nil }})
}

func approve(policy []byte, _ attest.Digest) (*Release, error) { return ParseRelease(policy) }

// TestPowerCut takes the power at each write of an update and its trial, good
// or bad: always one of the two images starts whole, a bad one does not stay,
// the counter is raised only once the firmware would start the new one, and
// in the end nothing is under way.
func TestPowerCut(t *testing.T) {
	old, next := program(`{"version":"1","epoch":16}`, 40<<10, 'o', true), program(`{"version":"2","epoch":17}`, 50<<10, 'n', true)
	whole := func(b []byte) bool { return bytes.Equal(b, old) || bytes.Equal(b, next) }
	l := newLaptop(t)
	for _, good := range []bool{true, false} {
		cuts, updated := 0, 0
		for ; ; cuts++ {
			l.install(t, old)
			l.writes, l.left = 0, cuts
			staged, cut := false, false
			for range 8 {
				s, attempts := l.firmware(t, whole)
				isNew := bytes.Equal(l.content(t, s), next)
				if l.counter > 16 && !isNew {
					t.Fatalf("cut %d: the old image starts after the counter was raised", cuts)
				}
				err := l.live(t, s, attempts, next, isNew, good, &staged)
				if errors.Is(err, errPower) {
					cut, l.left = true, -1
				} else if err != nil {
					t.Fatalf("cut %d: %v", cuts, err)
				}
			}
			r, err := load(l)
			if err != nil || r.Trial != nil || r.Returned {
				t.Fatalf("cut %d: in the end %+v, %v", cuts, r, err)
			}
			s, attempts := l.firmware(t, whole)
			if s != r.Good || attempts != 1 {
				t.Errorf("cut %d: slot %s starts at attempt %d, good is %s", cuts, s, attempts, r.Good)
			}
			if isNew := bytes.Equal(l.content(t, s), next); isNew != (l.counter == 17) || isNew && !good {
				t.Errorf("cut %d: new %v, counter %d", cuts, isNew, l.counter)
			} else if isNew {
				updated++
			}
			if !bytes.HasSuffix(l.vars["BootOrder"], []byte{9, 0}) {
				t.Errorf("cut %d: what else the firmware knew is gone: %x", cuts, l.vars["BootOrder"])
			}
			if !cut {
				break
			}
		}
		if cuts < 12 || good && updated < 3 {
			t.Errorf("%d cuts, %d updated", cuts, updated)
		}
		t.Logf("good %v: power cut at each of %d writes, the new image stayed after %d", good, cuts, updated)
	}
}

// live is one boot of the image in slot s, which stages the update once and
// ends by a restart.
func (l *laptop) live(t *testing.T, s Slot, attempts int, next []byte, isNew, good bool, staged *bool) error {
	slots, action, err := l.begin(s, attempts)
	if err != nil {
		return err
	}
	switch {
	case action == Restart:
		return nil
	case action == Watch && (!good || attempts > 1):
		return slots.GiveUp(FailedRefused)
	case action == Watch:
		if err := slots.MarkGood(); err != nil {
			return err
		}
	case !isNew && !*staged:
		*staged = true
		return slots.Stage(t.Context(), bytes.NewReader(next), int64(len(next)), approve)
	}
	if isNew {
		if err := l.write(); err != nil {
			return err
		}
		l.counter = 17
	}
	return nil
}

// TestLostVariables: a firmware that forgot its variables is told again.
func TestLostVariables(t *testing.T) {
	old, next := program(`{"version":"1"}`, 8<<10, 'o', true), program(`{"version":"2"}`, 8<<10, 'n', true)
	l := newLaptop(t)
	l.install(t, old)
	any := func([]byte) bool { return true }
	staged := false
	for range 2 {
		s, n := l.firmware(t, any)
		if err := l.live(t, s, n, next, s == SlotB, true, &staged); err != nil {
			t.Fatal(err)
		}
	}
	if s, _ := l.firmware(t, any); s != SlotB {
		t.Fatalf("slot %s after the update", s)
	}
	l.vars = map[string][]byte{}
	s, n := l.firmware(t, any)
	if _, action, err := l.begin(s, n); s != SlotA || action != Restart || err != nil {
		t.Errorf("slot %s: action %d, %v", s, action, err)
	}
	if s, _ := l.firmware(t, any); s != SlotB {
		t.Errorf("slot %s after the variables were made again", s)
	}
	// The good slot breaks: after one restart the other one is it.
	l.left = -1
	l.slots[SlotB].File.WriteAt(make([]byte, sector), 0)
	for range 3 {
		s, n = l.firmware(t, any)
		if _, _, err := l.begin(s, n); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := load(l); err != nil || s != SlotA || n != 1 || r.Good != SlotA || r.Failed == nil || r.Failed.Reason != FailedSlot {
		t.Errorf("slot %s, attempt %d: %+v, %v", s, n, r, err)
	}
}

// TestBegin looks at all records: a restart never follows a restart, and a slot
// is good only if it was, or runs for want of another.
func TestBegin(t *testing.T) {
	trials := []*Trial{nil}
	for _, stage := range []Stage{Writing, Staged, Armed, Trying, "unknown"} {
		trials = append(trials, &Trial{Slot: SlotB, Stage: stage, Version: "2"})
	}
	for _, running := range append(Both(), None) {
		for _, good := range []Slot{SlotA, None} {
			for _, trial := range trials {
				for _, returned := range []bool{false, true} {
					for attempts := range 3 {
						r := Record{Good: good, Trial: trial, Returned: returned}
						before, _ := json.Marshal(r)
						next, action := r.begin(running, attempts, time.Time{})
						if after, _ := json.Marshal(r); !bytes.Equal(before, after) {
							t.Fatalf("%s was changed to %s", before, after)
						}
						if action == Watch && (running != SlotB || next.Trial.Stage != Trying) {
							t.Errorf("%s, slot %s runs: watched as %+v", before, running, next)
						}
						if running != None && !next.valid() {
							t.Errorf("%s, slot %s runs: %+v", before, running, next)
						}
						if action == Restart {
							if _, again := next.begin(running, attempts, time.Time{}); again == Restart && next.Returned == false {
								t.Errorf("%s, slot %s runs: restarts for ever", before, running)
							}
							third, _ := next.begin(running, attempts, time.Time{})
							fourth, last := third.begin(running, attempts, time.Time{})
							if _, last2 := fourth.begin(running, attempts, time.Time{}); last == Restart || last2 == Restart {
								t.Errorf("%s, slot %s runs: restarts for ever", before, running)
							}
						}
					}
				}
			}
		}
	}
}

// TestStageRefuses: nothing that was not allowed can be started.
func TestStageRefuses(t *testing.T) {
	good := program(`{"version":"2"}`, 8<<10, 'n', true)
	refuse := func([]byte, attest.Digest) (*Release, error) { return nil, &gate.KeyRefused{Detail: "older"} }
	for name, c := range map[string]struct {
		image []byte
		size  int64
		check func([]byte, attest.Digest) (*Release, error)
		cause error
	}{
		"refused":     {good, int64(len(good)), refuse, nil},
		"cut short":   {good[:4096], int64(len(good)), approve, io.ErrUnexpectedEOF},
		"unsigned":    {program(`{}`, 8<<10, 'n', false), 8 << 10, approve, nil},
		"no policies": {bytes.Replace(good, []byte(".pcrsig"), []byte(".pcrsic"), 1), 8 << 10, approve, nil},
		"no program":  {make([]byte, 8<<10), 8 << 10, approve, nil},
		"too large":   {good, slotBytes + 1, approve, nil},
		"empty":       {nil, 0, approve, nil},
	} {
		l := newLaptop(t)
		l.install(t, program(`{}`, 8<<10, 'o', true))
		s, _, err := l.begin(SlotA, 1)
		if err != nil {
			t.Fatal(err)
		}
		err = s.Stage(t.Context(), bytes.NewReader(c.image), c.size, c.check)
		if err == nil || c.cause != nil && !errors.Is(err, c.cause) {
			t.Errorf("%s: %v", name, err)
		}
		if l.content(t, SlotB) != nil || l.vars["BootNext"] != nil || s.Status().Trial != nil || s.Status().Size != 0 {
			t.Errorf("%s: something is left: %+v", name, s.Status())
		}
	}
	l := newLaptop(t)
	l.install(t, good)
	ctx, stop := context.WithCancel(t.Context())
	stop()
	s, _, _ := l.begin(SlotA, 1)
	if err := s.Stage(ctx, bytes.NewReader(good), int64(len(good)), approve); !errors.Is(err, context.Canceled) {
		t.Errorf("ended: %v", err)
	}
	l.record, _ = json.Marshal(Record{Good: SlotB, Trial: &Trial{Slot: SlotA, Stage: Armed}})
	s, _, _ = l.begin(SlotA, 1)
	if err := s.Stage(t.Context(), bytes.NewReader(good), int64(len(good)), approve); !errors.Is(err, ErrTrying) {
		t.Errorf("in a trial: %v", err)
	}
}

// TestTrial: what ends a trial, and that the counter waits for the boot order.
func TestTrial(t *testing.T) {
	for name, c := range map[string]struct {
		proof  func(at time.Duration) Proof
		reason string // of giving up
		within time.Duration
	}{
		"good":    {func(at time.Duration) Proof { return Proof{Good: at > 8*time.Minute, Uplink: true} }, "", 9 * time.Minute},
		"refused": {func(time.Duration) Proof { return Proof{Refused: true, Uplink: true} }, FailedRefused, 2 * time.Minute},
		"now and then": {func(at time.Duration) Proof {
			return Proof{Refused: at%time.Minute < 30*time.Second, Good: at > time.Hour}
		}, "", 61 * time.Minute},
		"no tunnel":      {func(time.Duration) Proof { return Proof{Uplink: true} }, FailedTime, 11 * time.Minute},
		"no uplink":      {func(at time.Duration) Proof { return Proof{Good: at > 100*time.Hour} }, "", 101 * time.Hour},
		"uplink at last": {func(at time.Duration) Proof { return Proof{Uplink: at > time.Hour} }, FailedTime, 71 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLaptop(t)
			l.install(t, program(`{}`, 4<<10, 'o', true))
			l.record, _ = json.Marshal(Record{Good: SlotA, Trial: &Trial{Slot: SlotB, Stage: Armed, Version: "2"}})
			synctest.Test(t, func(t *testing.T) {
				s, action, err := l.begin(SlotB, 1)
				if err != nil || action != Watch {
					t.Fatal(action, err)
				}
				begin, restarted, raised := time.Now(), false, false
				g := Good{
					Release: &Release{Version: "2", Epoch: 17}, Slots: s, Trial: true, Limit: 10 * time.Minute,
					Look:    func(context.Context) Proof { return c.proof(time.Since(begin)) },
					Restart: func() { restarted = true },
					Raise: func(context.Context, gate.VolumeRequest) error {
						if r, _ := load(l); r.Good != SlotB || !slices.Equal(l.vars["BootOrder"][:2], []byte{1, 0}) {
							t.Errorf("raised with %+v and order %x", r, l.vars["BootOrder"])
						}
						raised = true
						return nil
					},
					Say: func(string, ...any) {},
				}
				if c.reason == "" { // the first attempts to change the order fail
					l.left = 0
					time.AfterFunc(c.within-30*time.Second, func() { l.left = -1 })
				}
				g.Watch(t.Context())
				st := s.Status()
				if d := time.Since(begin); d > c.within || raised != (c.reason == "") || restarted == raised {
					t.Errorf("after %v: raised %v, restarted %v", d, raised, restarted)
				}
				if c.reason != "" && (st.Failed == nil || st.Failed.Reason != c.reason || st.Good != SlotA || st.Failed.Version != "2") || c.reason == "" && st.Good != SlotB {
					t.Errorf("%+v", st)
				}
			})
		})
	}
}

func TestBootEntry(t *testing.T) {
	p := Place{2, 0x800, 0x1000, [16]byte{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}}
	if got := p.UUID(); got != "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" {
		t.Errorf("uuid %s", got)
	}
	// Worked out by hand from UEFI 2.10, sections 3.1.3, 10.3.5.1 and 10.3.5.4.
	const want = "01000000" + "5e00" + "530065006b006900730068006f0020006200" + "0000" +
		"04012a00" + "02000000" + "0008000000000000" + "0010000000000000" + "28732ac11ff8d211ba4b00a0c93ec93b" + "0202" +
		"04043000" + "5c004500460049005c0042004f004f0054005c0042004f004f0054005800360034002e004500460049000000" + "7fff0400"
	if got := fmt.Sprintf("%x", p.loadOption(SlotB)); got != want {
		t.Errorf("load option\n%s, want\n%s", got, want)
	}
}

func TestEFIVars(t *testing.T) {
	var asked []bool
	e := EFIVars{t.TempDir(), func(yes bool) error { asked = append(asked, yes); return nil }}
	for name, data := range map[string][]byte{
		"Boot00AF-" + globalVendor:             {7, 0, 0, 0, 1},
		"BootOrder-" + globalVendor:            {7, 0, 0, 0, 0xaf, 0},
		"Boot00AE-" + loaderVendor:             {7, 0, 0, 0, 1},
		"LoaderDevicePartUUID-" + loaderVendor: append([]byte{6, 0, 0, 0}, utf16z("C12A")...),
		"Boot0001-" + globalVendor:             {7},
	} {
		if err := os.WriteFile(filepath.Join(e.Dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if l, err := e.Entries(); err != nil || !maps.Equal(map[uint16]bool{l[0]: true, l[1]: true}, map[uint16]bool{0xaf: true, 1: true}) {
		t.Errorf("entries %v, %v", l, err)
	}
	if d, err := e.Get("BootOrder"); err != nil || !bytes.Equal(d, []byte{0xaf, 0}) {
		t.Errorf("order %x, %v", d, err)
	}
	if _, err := e.Get("BootNext"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	if _, err := e.Get("Boot0001"); err == nil {
		t.Error("a variable without attributes")
	}
	for _, data := range [][]byte{{1, 0}, nil} {
		if err := e.Set("BootNext", data); err != nil {
			t.Fatal(err)
		}
		if got, err := e.Get("BootNext"); !bytes.Equal(got, data) || (err == nil) != (data != nil) {
			t.Errorf("set %x: %x, %v", data, got, err)
		}
	}
	if !slices.Equal(asked, []bool{true, false, true, false}) {
		t.Errorf("writable: %v", asked)
	}
	if u, err := e.Loaded(); err != nil || u != "c12a" {
		t.Errorf("loaded %q, %v", u, err)
	}
}

func FuzzSection(f *testing.F) {
	f.Add(program(`{"version":"1"}`, 2048, 0, true))
	f.Fuzz(func(t *testing.T, b []byte) {
		if data, _, err := section(bytes.NewReader(b), ".pcrsig", 4096); err == nil && (len(data) > 4096 || !bytes.Contains(b, data)) {
			t.Errorf("%d bytes", len(data))
		}
	})
}

func FuzzReadPlace(f *testing.F) {
	f.Add(bytes.Repeat([]byte("EFI PART"), 256), uint32(1))
	f.Fuzz(func(t *testing.T, b []byte, n uint32) {
		if p, err := ReadPlace(bytes.NewReader(b), 512, n); err == nil && (p.Start == 0 || p.Size == 0) {
			t.Errorf("%+v", p)
		}
	})
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"good":"a","trial":{"slot":"b","stage":"armed"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := load(&laptop{record: append([]byte{}, b...)})
		if err != nil || r.Good != None && !r.valid() {
			t.Errorf("%+v, %v", r, err)
		}
	})
}
