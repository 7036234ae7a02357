package eventlog

import (
	"bytes"
	"encoding/binary"
)

// EmbeddedQuote is a quote that Windows wrote into its log when it started or
// resumed (a trust point): of the PCRs as the events before it left them, with
// a key of Windows' own (wbcl.h of the Windows SDK, SIPAEVENT_TRUSTPOINT_*).
type EmbeddedQuote struct {
	Event     int    // position of the note that carries it
	Message   []byte // TPMS_ATTEST
	Signature []byte // plain, over SHA-1 by older versions
}

// SIPA events of a trust point.
const (
	sipaTrustPoint     uint32 = 0xc0010004 // an aggregation
	sipaQuote          uint32 = 0x80080001
	sipaQuoteSignature uint32 = 0x80080002
)

// Quotes lists the quotes in the log. Nobody has verified them.
func (l *Log) Quotes() (list []EmbeddedQuote) {
	for _, e := range l.Notes {
		// Only in events that belong to no PCR.
		if uint32(e.PCR) == 0xffffffff && checkSIPA(e.Data, 0) == nil {
			list = append(list, quotesIn(e.Data, e.Number, 0)...)
		}
	}
	return list
}

// quotesIn looks for trust points in what checkSIPA has passed.
func quotesIn(b []byte, number, depth int) (list []EmbeddedQuote) {
	q := EmbeddedQuote{Event: number}
	for len(b) >= 8 && depth <= maxNesting {
		tag, size := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		body := b[8 : 8+size]
		switch {
		case tag == sipaQuote:
			q.Message = body
		case tag == sipaQuoteSignature:
			q.Signature = body
		case isContainer(tag):
			list = append(list, quotesIn(body, number, depth+1)...)
		}
		b = b[8+size:]
	}
	if q.Message != nil && q.Signature != nil {
		list = append(list, q)
	}
	return list
}

// Before replays the events that stand before position number. PCRs without
// events have their reset value.
func (l *Log) Before(b Bank, number int) map[int][]byte {
	out := make(map[int][]byte)
	for _, e := range l.Events {
		if d := e.DigestIn(b); e.Number < number && d != nil {
			if out[e.PCR] == nil {
				out[e.PCR] = make([]byte, b.Size()) // a dynamic launch resets its PCRs to zeros, too
			}
			out[e.PCR] = b.Sum(nil, append(out[e.PCR], d...))
		}
	}
	for pcr := range 24 {
		if out[pcr] == nil {
			out[pcr] = make([]byte, b.Size())
			if pcr >= 17 && pcr <= 22 { // section 3.3.1
				out[pcr] = bytes.Repeat([]byte{0xff}, b.Size())
			}
		}
	}
	return out
}
