package vscard

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

var atr = []byte{0x3b, 0x80, 0x80, 0x01, 0x01}

// testCard echoes commands with status 9000. The command "wait" is answered
// when its context ends.
type testCard struct{ resets chan struct{} }

func (c testCard) Reset() { c.resets <- struct{}{} }

func (c testCard) Transmit(ctx context.Context, command []byte) []byte {
	if string(command) == "wait" {
		<-ctx.Done()
	}
	return append(bytes.Clone(command), 0x90, 0x00)
}

// qemu is the other end of a link, as ccid-card-passthru behaves.
type qemu struct {
	t *testing.T
	net.Conn
	done chan error
}

func start(t *testing.T, s *Slot) *qemu {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "card"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	end, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	q := &qemu{t, c, make(chan error, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { q.done <- s.Serve(ctx, end) }()
	t.Cleanup(func() { cancel(); c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return q
}

func (q *qemu) send(typ Type, reader uint32, body []byte) {
	q.t.Helper()
	if _, err := q.Write((Message{typ, reader, body}).Append(nil)); err != nil {
		q.t.Fatal(err)
	}
}

func (q *qemu) expect(typ Type, body []byte) {
	q.t.Helper()
	m, err := Read(q)
	if err != nil {
		q.t.Fatalf("want message type %d: %v", typ, err)
	}
	if m.Type != typ || body != nil && !bytes.Equal(m.Body, body) {
		q.t.Fatalf("message type %d, body %x; want type %d, body %x", m.Type, m.Body, typ, body)
	}
}

// greet goes through what both ends say before there is a card.
func (q *qemu) greet() {
	q.t.Helper()
	q.expect(Init, initBody())
	q.send(Init, noID, initBody())
	q.expect(ReaderAdd, nil)
	q.send(Error, 0, make([]byte, 4))
	q.expect(CardRemove, nil)
	q.send(Error, 0, make([]byte, 4))
}

func newSlot(t *testing.T) (*Slot, testCard) {
	t.Helper()
	card := testCard{make(chan struct{}, 16)}
	s, err := NewSlot(card, atr)
	if err != nil {
		t.Fatal(err)
	}
	return s, card
}

func TestInsertCommandRemove(t *testing.T) {
	s, card := newSlot(t)
	q := start(t, s)
	q.greet()
	s.Insert()
	q.expect(ATR, atr)
	<-card.resets
	q.send(Error, 0, make([]byte, 4))
	q.send(APDU, 0, []byte{0, 0xa4, 4, 0})
	q.expect(APDU, []byte{0, 0xa4, 4, 0, 0x90, 0})
	q.send(Flush, 0, nil)
	q.expect(FlushComplete, nil)
	s.Remove()
	q.expect(CardRemove, nil)
	if s.Inserted() {
		t.Error("still inserted after Remove")
	}
	q.Close()
	if err := <-q.done; err != nil {
		t.Errorf("qemu's end: %v", err)
	}
}

// A card that was inserted while QEMU was away is there when it comes, and a
// second QEMU takes the first one's place.
func TestReconnect(t *testing.T) {
	s, card := newSlot(t)
	s.Insert()
	first := start(t, s)
	first.greet()
	first.expect(ATR, atr)
	<-card.resets
	second := start(t, s)
	if err := <-first.done; err != nil {
		t.Errorf("the first connection: %v", err)
	}
	second.greet()
	second.expect(ATR, atr)
	<-card.resets
}

// Removal ends a command that waits for a finger, and its answer stays unsaid.
func TestRemovalInterrupts(t *testing.T) {
	s, _ := newSlot(t)
	s.Insert()
	q := start(t, s)
	q.greet()
	q.expect(ATR, atr)
	q.send(APDU, 0, []byte("wait"))
	q.send(Flush, 0, nil) // answered: the command before it is under way
	q.expect(FlushComplete, nil)
	s.Remove()
	q.expect(CardRemove, nil)
	s.Insert()
	q.expect(ATR, atr)
	q.send(APDU, 0, []byte("next"))
	q.expect(APDU, []byte("next\x90\x00"))
}

// A reader that gave up on an answer gets the next command's, not the old one.
func TestNextCommandInterrupts(t *testing.T) {
	s, _ := newSlot(t)
	s.Insert()
	q := start(t, s)
	q.greet()
	q.expect(ATR, atr)
	for range 3 {
		q.send(APDU, 0, []byte("wait"))
	}
	q.send(APDU, 0, []byte("next"))
	q.expect(APDU, []byte("next\x90\x00"))
}

func TestCommandWithoutCard(t *testing.T) {
	s, _ := newSlot(t)
	q := start(t, s)
	q.greet()
	q.send(APDU, 0, []byte{1})
	q.send(Flush, 0, nil)
	q.expect(FlushComplete, nil)
}

func TestReaderRefused(t *testing.T) {
	s, _ := newSlot(t)
	q := start(t, s)
	q.expect(Init, nil)
	q.send(Init, noID, initBody())
	q.expect(ReaderAdd, nil)
	q.send(Error, noID, []byte{0, 0, 0, 2})
	if err := <-q.done; err == nil {
		t.Error("no error although QEMU refused the reader")
	}
}

func TestReadCaps(t *testing.T) {
	big := binary.BigEndian.AppendUint32(nil, uint32(APDU))
	big = binary.BigEndian.AppendUint32(big, 0)
	big = binary.BigEndian.AppendUint32(big, MaxBody+1)
	if _, err := Read(bytes.NewReader(big)); err == nil {
		t.Error("a body over MaxBody was read")
	}
	whole := (Message{APDU, 0, []byte("abcd")}).Append(nil)
	for n := 1; n < len(whole); n++ {
		if _, err := Read(bytes.NewReader(whole[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes: %v, want an unexpected end", n, len(whole), err)
		}
	}
	if _, err := Read(bytes.NewReader(nil)); err != io.EOF {
		t.Errorf("no bytes: %v, want io.EOF", err)
	}
	for _, n := range []int{0, 1, 34} {
		if _, err := NewSlot(testCard{}, make([]byte, n)); err == nil {
			t.Errorf("an answer to reset of %d bytes was taken", n)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add((Message{APDU, 0, []byte{0, 0xa4, 4, 0}}).Append(nil))
	f.Add((Message{Init, noID, initBody()}).Append(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		m, err := Read(r)
		if err != nil {
			return
		}
		if !bytes.Equal(m.Append(nil), data[:len(data)-r.Len()]) {
			t.Errorf("%x is read as %+v", data, m)
		}
	})
}

// FuzzLink feeds a link whatever a QEMU gone bad may send.
func FuzzLink(f *testing.F) {
	var talk []byte
	for _, m := range []Message{{Init, noID, initBody()}, {Error, 0, make([]byte, 4)}, {APDU, 0, []byte{0, 0xa4, 4, 0}}, {Flush, 0, nil}} {
		talk = m.Append(talk)
	}
	f.Add(talk)
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := NewSlot(testCard{make(chan struct{}, 1<<16)}, atr)
		if err != nil {
			t.Fatal(err)
		}
		s.Insert()
		ours, theirs := net.Pipe()
		go func() {
			theirs.Write(data)
			theirs.Close()
		}()
		go io.Copy(io.Discard, theirs)
		_ = s.Serve(t.Context(), ours)
	})
}
