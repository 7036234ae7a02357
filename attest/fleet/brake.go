package fleet

import (
	"sync"
	"time"

	"sekisho/attest"
)

// A mass refusal is many devices refused within one minute, of which there
// are at least brakeDevices, so that a pilot of three laptops does not alarm.
const (
	brakeWindow    = time.Minute
	brakeDevices   = 10
	defaultPercent = 5
)

// Brake notices mass refusals: an update gone wrong looks like an attack. It
// opens nothing: who is refused stays refused. It is safe for concurrent use.
type Brake struct {
	percent int

	mu      sync.Mutex
	refused map[attest.Digest]refused
}

type refused struct {
	at     time.Time
	reason attest.Reason
}

// NewBrake returns a brake for over percent of the enrolled devices.
func NewBrake(percent int) *Brake {
	return &Brake{percent: percent, refused: make(map[attest.Digest]refused)}
}

// Note takes in the result of a device whose quote was authentic. It returns a
// hold if over the limit of devices, of so many enrolled, were refused within
// the last minute.
func (b *Brake) Note(r attest.Result, enrolled int, now time.Time) *Hold {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.Status == attest.StatusAffirming {
		delete(b.refused, r.Device)
		return nil
	}
	// Nobody is affirmed before the first policy: that is no update gone wrong,
	// and a hold would keep the first policy out.
	if r.Reason == attest.ReasonNoPolicy {
		return nil
	}
	b.refused[r.Device] = refused{now, r.Reason}
	if len(b.refused) < brakeDevices || len(b.refused)*100 <= b.percent*enrolled {
		return nil
	}
	h := &Hold{Since: now.UTC().Truncate(time.Second), Devices: enrolled, Reasons: make(map[attest.Reason]int)}
	for id, x := range b.refused {
		if now.Sub(x.at) > brakeWindow {
			delete(b.refused, id)
			continue
		}
		h.Refused++
		h.Reasons[x.reason]++
	}
	if h.Refused < brakeDevices || h.Refused*100 <= b.percent*enrolled {
		return nil
	}
	clear(b.refused) // the next alarm needs as many again
	return h
}
