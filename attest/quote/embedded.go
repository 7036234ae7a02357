package quote

import (
	"crypto"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/tpm"
)

// JudgeEmbedded judges the quotes that Windows wrote into its own log, by the
// key that must have signed at least one of them. Pass proves: the events of
// the quoted PCRs before such a quote are those that the TPM had measured when
// it was made. Of other PCRs, and Windows leaves out 7, it proves nothing.
func JudgeEmbedded(l *eventlog.Log, key *tpm.Signer) *Report {
	var last *Report
	for _, q := range l.Quotes() {
		in := Input{Key: key, Message: q.Message, Values: make(map[eventlog.Bank]map[int][]byte), Nonce: extraData(q.Message)}
		in.signature = key.PlainSignature(q.Signature, hashOf(q.Message))
		for _, b := range l.Banks() {
			in.Values[b] = l.Before(b, q.Event)
		}
		last = Judge(in)
		for i := range last.Findings {
			last.Findings[i].Event = &q.Event
		}
		if last.Verdict == eventlog.VerdictPass {
			return last
		}
	}
	if last != nil {
		return last
	}
	return &Report{Selection: []Selection{}, Findings: []attest.Remark{attest.NewRemark(attest.SeverityBlock, attest.ReasonSignatureInvalid,
		attest.Say("ログの中にクォートがありません。", "the log has no quote in it"))}}
}

// extraData is what the quote was made for: Windows names no nonce of anyone's.
func extraData(message []byte) []byte {
	if s, err := tpm.ParseStatement(message); err == nil {
		return append([]byte{}, s.ExtraData...)
	}
	return nil
}

// hashOf is the hash of a plain signature, which does not name it: that of the
// quote's digest over the PCRs (TPM 2.0 Library, Part 3, section 18.4).
func hashOf(message []byte) crypto.Hash {
	s, err := tpm.ParseStatement(message)
	switch {
	case err != nil:
	case len(s.PCRDigest) == crypto.SHA1.Size():
		return crypto.SHA1
	case len(s.PCRDigest) == crypto.SHA384.Size():
		return crypto.SHA384
	case len(s.PCRDigest) == crypto.SHA512.Size():
		return crypto.SHA512
	}
	return crypto.SHA256
}
