package vscard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// writeTimeout is how long QEMU may take to read a message.
const writeTimeout = 5 * time.Second

// Card answers commands.
type Card interface {
	// Reset is a power-up of the card: whatever was proven is forgotten.
	Reset()
	// Transmit answers one command with one response, status word included.
	// It may take as long as the person needs to touch the reader.
	Transmit(ctx context.Context, command []byte) []byte
}

// Slot is the virtual reader of the work domain. A card is in it or not; while
// QEMU is away the slot remembers which, and a QEMU that comes gets to see it.
// The zero value is not usable; NewSlot makes an empty one. Its methods are
// safe for concurrent use.
type Slot struct {
	card Card
	atr  []byte

	mu       sync.Mutex
	inserted bool
	link     *link // QEMU's connection, nil while it is away
}

// NewSlot returns an empty slot for card, whose answer to reset is atr.
func NewSlot(card Card, atr []byte) (*Slot, error) {
	if len(atr) < 2 || len(atr) > maxATR {
		return nil, fmt.Errorf("vscard: answer to reset of %d bytes, want 2 to %d (ISO 7816-3, section 8.1)", len(atr), maxATR)
	}
	return &Slot{card: card, atr: atr}, nil
}

// Inserted reports whether the card is in the slot.
func (s *Slot) Inserted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inserted
}

// Insert puts the card in. The work domain sees a card that was just powered.
func (s *Slot) Insert() { s.set(true) }

// Remove takes the card out at once; a command under way is ended and its
// answer not delivered.
func (s *Slot) Remove() { s.set(false) }

func (s *Slot) set(in bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inserted == in {
		return
	}
	s.inserted = in
	if s.link != nil {
		s.link.show(in)
	}
}

// link is one connection of QEMU's.
type link struct {
	slot *Slot
	conn net.Conn

	// Of the slot's mutex.
	ready  bool               // QEMU has accepted the reader
	reader uint32             // its number
	shown  bool               // QEMU was told of the card
	serial uint64             // of the command that may be answered; removal raises it too
	stop   context.CancelFunc // ends that command
}

// Serve is the card's end of conn until QEMU closes it or ctx ends; it closes
// conn. A second connection takes the first one's place: QEMU was started
// anew. nil: the other end closed in order, or ctx ended.
func (s *Slot) Serve(ctx context.Context, conn net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l := &link{slot: s, conn: conn, reader: noID}
	s.mu.Lock()
	old := s.link
	s.link = l
	s.mu.Unlock()
	if old != nil {
		old.conn.Close()
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer func() {
		stop()
		conn.Close()
		s.mu.Lock()
		if s.link == l {
			s.link = nil
		}
		s.mu.Unlock()
	}()
	err := l.run(ctx)
	if ctx.Err() != nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// run begins with Init, as the client of the protocol does, and answers until
// the connection ends. Commands are answered one at a time, as a card does;
// removal interrupts the one under way.
func (l *link) run(ctx context.Context) error {
	if err := l.send(Message{Init, noID, initBody()}); err != nil {
		return err
	}
	commands := make(chan command, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for c := range commands {
			l.answer(c)
		}
	})
	defer func() {
		l.slot.mu.Lock()
		l.interrupt()
		l.slot.mu.Unlock()
		close(commands)
		wg.Wait()
	}()
	for {
		m, err := Read(l.conn)
		if err != nil {
			return err
		}
		if err := l.receive(ctx, m, commands); err != nil {
			return err
		}
	}
}

// command is one command of the work domain.
type command struct {
	ctx    context.Context
	serial uint64
	data   []byte
}

// receive acts on one message of QEMU's.
func (l *link) receive(ctx context.Context, m Message, commands chan command) error {
	s := l.slot
	s.mu.Lock()
	defer s.mu.Unlock()
	switch m.Type {
	case Init:
		return l.send(Message{ReaderAdd, noID, []byte("sekisho\x00")})
	case Error:
		code, err := errorCode(m.Body)
		if err != nil {
			return err
		}
		if !l.ready {
			if code != 0 {
				return fmt.Errorf("vscard: qemu refused the reader with code %d", code)
			}
			// The first success is ReaderAdd's; it names the reader.
			l.ready, l.reader = true, m.Reader
			// A QEMU that outlived an earlier card may still show it.
			if err := l.send(Message{CardRemove, l.reader, nil}); err != nil {
				return err
			}
			if s.inserted {
				l.show(true)
			}
		}
	case APDU:
		if !l.shown {
			return nil // a command on its way when the card was removed
		}
		// A reader sends the next command after the answer, or when it has
		// given up on that: then nobody waits for the one before.
		l.interrupt()
		select {
		case <-commands:
		default:
		}
		ctx, l.stop = context.WithCancel(ctx)
		commands <- command{ctx, l.serial, m.Body}
	case Flush:
		return l.send(Message{FlushComplete, m.Reader, nil})
	}
	return nil // what is not known is passed over, as the protocol has it
}

// interrupt ends the command under way, whose answer is not delivered then.
// The slot's mutex is held.
func (l *link) interrupt() {
	l.serial++
	if l.stop != nil {
		l.stop()
		l.stop = nil
	}
}

// show tells QEMU of the card's insertion or removal. The slot's mutex is
// held. An error of the connection shows itself to run's reading.
func (l *link) show(in bool) {
	if !l.ready || l.shown == in {
		return
	}
	l.shown = in
	if in {
		l.slot.card.Reset()
		_ = l.send(Message{ATR, l.reader, l.slot.atr})
		return
	}
	l.interrupt()
	_ = l.send(Message{CardRemove, l.reader, nil})
}

// answer has the card answer c, and delivers that unless the card was removed
// or another command came meanwhile.
func (l *link) answer(c command) {
	response := l.slot.card.Transmit(c.ctx, c.data)
	l.slot.mu.Lock()
	defer l.slot.mu.Unlock()
	if l.shown && l.serial == c.serial {
		_ = l.send(Message{APDU, l.reader, response})
	}
}

// send writes one message whole: QEMU keeps what it has of a message when a
// connection breaks in the middle of it.
func (l *link) send(m Message) error {
	if err := l.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return fmt.Errorf("vscard: %w", err)
	}
	if _, err := l.conn.Write(m.Append(nil)); err != nil {
		return fmt.Errorf("vscard: %w", err)
	}
	return nil
}
