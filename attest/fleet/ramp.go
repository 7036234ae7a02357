package fleet

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/verifier"
)

// Of the admission ramp.
const (
	rampFirst = 512     // attestations a second, before any overload was seen
	rampLeast = 16      // the pace never falls below
	rampMost  = 1 << 14 // nor rises above
	rampBurst = time.Second / 4

	// A wait up to rampHold is spent here, on the connection; for a longer one
	// the laptop goes and comes back.
	rampHold = time.Second
	rampFar  = 10 * time.Minute // nobody is sent away for longer
	rampGap  = 60 * time.Second // how long after its time a ticket is good

	ticketSize = 8 + 16
)

// ramp admits laptops at the pace at which their evidence can be judged. Whom
// it cannot take now it gives a time, one after the other in the order of their
// coming, and a ticket for it: so a crowd neither waits on connections nor
// comes back all at once, and who came first is served first.
//
// It stands before the challenge, the first and cheap step. The nonce is the
// laptop's ticket for the second one, which waits its turn and is never sent
// away for what others do.
//
// The pace is found by trying: it rises while laptops are told to wait though
// evidence is judged at once, and falls to what was judged in the last second
// when evidence has to wait. Times that were given before are kept or put off,
// never forgotten.
type ramp struct {
	key [sha256.Size]byte
	now func() time.Time

	mu      sync.Mutex
	rate    float64   // admissions a second
	next    time.Time // when the next place is free
	since   time.Time // of the second that is counted
	judged  int       // in it
	line    int       // most evidence that waited at once, in it
	held    bool      // somebody was told to wait, in it
	slowed  bool      // an overload was seen before
	waiting int       // evidence that waits now
}

func newRamp(key [verifier.NonceKeySize]byte, now func() time.Time) *ramp {
	mac := hmac.New(sha256.New, key[:])
	mac.Write([]byte("sekisho/attest/ramp/1"))
	return &ramp{key: [sha256.Size]byte(mac.Sum(nil)), now: now, rate: rampFirst}
}

// ticket is a device's right to be admitted from a time on: the time in ms ‖
// MAC, by the key that all verifiers of the organisation share.
func (r *ramp) ticket(device attest.Digest, due time.Time) []byte {
	t := binary.BigEndian.AppendUint64(nil, uint64(due.UnixMilli()))
	mac := hmac.New(sha256.New, r.key[:])
	mac.Write(t)
	mac.Write(device[:])
	return append(t, mac.Sum(nil)[:ticketSize-8]...)
}

// due returns the time of a ticket; false if it is not good.
func (r *ramp) due(device attest.Digest, ticket []byte, now time.Time) (time.Time, bool) {
	if len(ticket) != ticketSize {
		return time.Time{}, false
	}
	due := time.UnixMilli(int64(binary.BigEndian.Uint64(ticket)))
	return due, hmac.Equal(r.ticket(device, due), ticket) && now.Before(due.Add(rampGap))
}

// admit returns how long a device has to wait, 0 if it may go on, and the
// ticket that it comes back with.
func (r *ramp) admit(device attest.Digest, ticket []byte) (time.Duration, []byte) {
	now := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.adjust(now)
	// While evidence waits, nobody new is let in; who has a place keeps it.
	var behind time.Duration
	if r.waiting > 2*maxWork {
		behind = time.Duration(float64(r.waiting) / r.rate * float64(time.Second))
	}
	if due, ok := r.due(device, ticket, now); ok { // counted when it was given
		if wait := due.Sub(now); wait > 0 {
			return wait, ticket
		}
		if behind == 0 {
			return 0, nil
		}
		wait := rampHold + scatter(behind)
		return wait, r.ticket(device, now.Add(wait))
	}
	slot := time.Duration(float64(time.Second) / r.rate)
	if free := now.Add(-rampBurst); r.next.Before(free) {
		r.next = free
	}
	if free := now.Add(behind); behind > 0 && r.next.Before(free) {
		r.next = free
	}
	wait := r.next.Sub(now)
	if wait <= 0 {
		r.next = r.next.Add(slot)
		return 0, nil
	}
	r.held = true
	if wait > rampFar { // without a place; it asks again
		return rampFar - rand.N(rampFar/4), nil
	}
	r.next = r.next.Add(slot)
	return wait, r.ticket(device, now.Add(wait))
}

// enter notes that evidence waits to be judged, and leave that it was.
func (r *ramp) enter() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting++
	r.line = max(r.line, r.waiting)
}

func (r *ramp) leave() {
	now := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting--
	r.judged++
	r.adjust(now)
}

// adjust finds the pace anew after each second. r.mu is held.
func (r *ramp) adjust(now time.Time) {
	took := now.Sub(r.since)
	if took < time.Second {
		return
	}
	if took < 2*time.Second { // else nothing happened for a while
		switch {
		case r.line > 4*maxWork:
			r.pace(0.95 * float64(r.judged) / took.Seconds())
			r.slowed = true
		case r.held && r.line <= 2*maxWork && r.slowed:
			r.pace(1.1 * r.rate)
		case r.held && r.line <= 2*maxWork:
			r.pace(1.5 * r.rate)
		}
	}
	r.since, r.judged, r.line, r.held = now, 0, r.waiting, false
}

// pace changes the pace. Places that were given stay as they are; when it
// rises, new ones come between them.
func (r *ramp) pace(rate float64) {
	rate = min(rampMost, max(rampLeast, rate))
	if ahead := r.next.Sub(r.now()); ahead > 0 && rate > r.rate {
		r.next = r.next.Add(-time.Duration(float64(ahead) * (1 - r.rate/rate)))
	}
	r.rate = rate
}

// state is what the ramp is at, for whoever watches the verifier.
func (r *ramp) state() (rate float64, ahead time.Duration, waiting int) {
	now := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rate, max(0, r.next.Sub(now)), r.waiting
}
