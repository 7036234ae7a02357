package verifier

import (
	"testing"

	"sekisho/attest"
	"sekisho/attest/tpm"
	"sekisho/attest/tpm/faketpm"
)

// TestOrderOfChecks: evidence with many faults is refused for the first of
// them, in the order of docs/attest.md, so that nothing is believed before what
// it rests on.
func TestOrderOfChecks(t *testing.T) {
	faults := []struct {
		want     attest.Reason
		quote    func(*faketpm.Quote) // before it is signed
		evidence func(*bench)         // after
	}{
		{attest.ReasonVerifierMismatch, nil, func(b *bench) { b.in.Evidence.Verifier = "other" }},
		{attest.ReasonPurposeMismatch, nil, func(b *bench) { b.in.Evidence.Purpose = 9 }},
		{attest.ReasonDeviceUnknown, nil, func(b *bench) { b.in.Device.ID[0] ^= 1 }},
		{attest.ReasonSignatureInvalid, nil, func(b *bench) { b.in.Evidence.QuoteSig[10] ^= 1 }},
		{attest.ReasonQuoteMagic, func(q *faketpm.Quote) { q.Magic = 1 }, nil},
		{attest.ReasonQuoteSigner, func(q *faketpm.Quote) { q.Signer[5] ^= 1 }, nil},
		{attest.ReasonBindingMismatch, nil, func(b *bench) { b.in.Evidence.Nonce = []byte("other") }},
		{attest.ReasonPCRSelection, func(q *faketpm.Quote) { q.Selections = nil }, nil},
		{attest.ReasonPCRDigest, nil, func(b *bench) { b.in.Evidence.PCRs[11] = make([]byte, 32) }},
		{attest.ReasonClockReversed, nil, func(b *bench) { b.in.Device.Clock = &tpm.Clock{ResetCount: 9} }},
		{attest.ReasonKeyNotCertified, nil, func(b *bench) { b.in.Evidence.CertifySig[10] ^= 1 }},
		{attest.ReasonNoPolicy, nil, func(b *bench) { b.in.PolicyNeeded = true }},
		{attest.ReasonNoReferenceValues, nil, func(b *bench) { b.in.References = nil }},
	}
	for i, first := range faults {
		b := newBench(t)
		b.requote(func(q *faketpm.Quote) {
			for _, f := range faults[i:] {
				if f.quote != nil {
					f.quote(q)
				}
			}
		})
		for _, f := range faults[i:] {
			if f.evidence != nil {
				f.evidence(b)
			}
		}
		if r := Appraise(b.in).Result; r.Reason != first.want {
			t.Errorf("%v and all that follows: refused for %v", first.want, r.Reason)
		}
	}
}
