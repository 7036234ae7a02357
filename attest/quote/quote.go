// Package quote judges a bare quote of anyone's TPM: the sample that a security
// team holds in its hands, without a device or a server. Evidence of enrolled
// devices is judged by attest/verifier, which allows far less. It does no I/O.
package quote

import (
	"bytes"
	"crypto"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"slices"

	"sekisho/attest"
	"sekisho/attest/eventlog"
	"sekisho/attest/tpm"
)

// Input is a sample. Key, Message and Signature are needed; the rest adds what
// it can prove.
type Input struct {
	Key       *tpm.Signer
	Message   []byte                           // TPMS_ATTEST, or TPM2B_ATTEST
	Signature []byte                           // TPMT_SIGNATURE, or plain
	Nonce     []byte                           // nil: not judged
	Values    map[eventlog.Bank]map[int][]byte // nil: not judged
	Log       *eventlog.Log                    // nil: not judged; needs Values

	signature *tpm.Signature // in place of Signature
}

// Selection is what a quote covers in one bank.
type Selection struct {
	Bank eventlog.Bank `json:"bank"`
	PCRs []int         `json:"pcrs"`
}

// Report is what Judge found. The zero value refuses.
type Report struct {
	Verdict   eventlog.Verdict `json:"verdict"`
	Scheme    string           `json:"scheme,omitempty"`
	Hash      string           `json:"hash,omitempty"`
	Selection []Selection      `json:"selection"`
	ExtraData string           `json:"extraData,omitempty"` // hexadecimal
	Clock     *tpm.Clock       `json:"clock,omitempty"`
	Firmware  string           `json:"firmware,omitempty"`
	Log       *eventlog.Report `json:"log,omitempty"`
	Findings  []attest.Remark  `json:"findings"`
}

// judgement is a Judge under way.
type judgement struct {
	Input
	report    *Report
	statement *tpm.Statement
	signature *tpm.Signature
}

// Judge judges a quote. The verdict pass proves: the message is
// a TPM's (magic) and a quote (type); Key signed it; it covers at least one
// PCR; and, for what was given: it was made for Nonce; every PCR that it covers
// has a value in Values, and their digest is the quoted one; Log passes the
// strict layer against those values and no others.
func Judge(in Input) *Report {
	j := &judgement{Input: in, report: &Report{Selection: []Selection{}, Findings: []attest.Remark{}}}
	if !j.head() {
		return j.report
	}
	pass := true
	for _, check := range []func() bool{j.signed, j.covers, j.fresh, j.values, j.log} {
		pass = check() && pass // whoever asks wants to hear all
	}
	if pass {
		j.report.Verdict = eventlog.VerdictPass
	}
	return j.report
}

// refuse adds a finding that refuses, and returns false.
func (j *judgement) refuse(code attest.Reason, ja, en string, a ...any) bool {
	j.report.Findings = append(j.report.Findings, attest.NewRemark(attest.SeverityBlock, code, attest.Say(ja, en, a...)))
	return false
}

func (j *judgement) warn(code attest.Reason, ja, en string, a ...any) {
	j.report.Findings = append(j.report.Findings, attest.NewRemark(attest.SeverityWarn, code, attest.Say(ja, en, a...)))
}

func (j *judgement) head() bool {
	m := j.Message
	if len(m) > 2 && int(m[0])<<8|int(m[1]) == len(m)-2 {
		j.Message = m[2:]
	}
	magic, kind, err := tpm.Head(j.Message)
	switch {
	case err != nil:
		return j.refuse(attest.ReasonEvidenceMalformed, "クォートを読み取れません（%v）。", "%v", err)
	case magic != tpm.Generated:
		return j.refuse(attest.ReasonQuoteMagic, "TPM が作ったものではありません（マジック 0x%08x、正しくは 0x%08x）。", "quote was not made by a TPM: magic 0x%08x, want 0x%08x", magic, tpm.Generated)
	case kind != tpm.TypeQuote:
		return j.refuse(attest.ReasonQuoteType, "種類 0x%04x はクォートではありません（クォートは 0x%04x）。", "statement of type 0x%04x is no quote, which is 0x%04x", kind, tpm.TypeQuote)
	}
	if j.statement, err = tpm.ParseStatement(j.Message); err != nil {
		return j.refuse(attest.ReasonEvidenceMalformed, "クォートを読み取れません（%v）。", "%v", err)
	}
	s := j.statement
	j.report.ExtraData, j.report.Clock, j.report.Firmware = hex.EncodeToString(s.ExtraData), &s.Clock, fmt.Sprintf("%016x", s.Firmware)
	for _, sel := range s.Selection {
		if len(sel.PCRs) > 0 {
			j.report.Selection = append(j.report.Selection, Selection{eventlog.Bank(sel.Bank), sel.PCRs})
		}
	}
	return true
}

func (j *judgement) signed() (ok bool) {
	var err error
	if j.signature = j.Input.signature; j.signature == nil {
		j.signature, err = j.Key.ParseSignature(j.Signature, hashOf(j.Message))
	}
	if err != nil {
		return j.refuse(attest.ReasonSignatureInvalid, "署名を読み取れません（%v）。", "%v", err)
	}
	j.report.Scheme, j.report.Hash = j.signature.Scheme, j.signature.Hash.String()
	if err := j.Key.Verify(j.Message, j.signature); err != nil {
		return j.refuse(attest.ReasonSignatureInvalid, "この鍵による署名ではありません（%v）。", "signature: %v", err)
	}
	switch {
	case j.Key.Area == nil:
		j.warn(attest.ReasonKeyAttributes, "鍵が PEM だけで示されています。TPM が作ったものだけに署名する鍵かどうかは分かりません。", "the key is known as PEM only: nothing here says that it signs only what a TPM made")
	case !j.Key.Restricted():
		return j.refuse(attest.ReasonKeyAttributes, "鍵が restricted ではありません。使える人なら誰でも偽のクォートに署名できます。", "the key is not restricted to signing what its TPM made: anyone who may use it can sign a quote that is none")
	}
	if j.signature.Hash == crypto.SHA1 {
		j.warn(attest.ReasonSignatureInvalid, "署名が SHA-1 によるもので、偽造できます。", "the signature is over SHA-1, which can be forged")
	}
	if !j.statement.Clock.Safe {
		j.warn(attest.ReasonClockUnsafe, "前回の正常な終了の後に TPM の時計が戻った可能性があります。", "the TPM's clock may have gone back since its last orderly shutdown")
	}
	return true
}

func (j *judgement) covers() bool {
	if len(j.report.Selection) == 0 {
		return j.refuse(attest.ReasonPCRSelection, "クォートが PCR を一つも含みません。機器について何も証明しません。", "the quote covers no PCR: it proves nothing about the machine")
	}
	for i, s := range j.report.Selection {
		if slices.ContainsFunc(j.report.Selection[:i], func(o Selection) bool { return o.Bank == s.Bank }) {
			return j.refuse(attest.ReasonPCRSelection, "クォートがバンク %s を二度選んでいます。", "the quote selects bank %s twice", s.Bank)
		}
	}
	return true
}

func (j *judgement) fresh() bool {
	switch {
	case j.Nonce == nil:
		j.warn(attest.ReasonNonceInvalid, "比較するノンスがありません。古いクォートかもしれません。", "no nonce was given to compare with: the quote may be an old one")
	case subtle.ConstantTimeCompare(j.Nonce, j.statement.ExtraData) != 1:
		j.refuse(attest.ReasonBindingMismatch, "クォートは別のノンスのために作られました。", "the quote was made for another nonce")
		f := &j.report.Findings[len(j.report.Findings)-1]
		f.Expected, f.Seen = hex.EncodeToString(j.Nonce), hex.EncodeToString(j.statement.ExtraData)
		return false
	}
	return true
}

// values compares the digest over the values of the selected PCRs, in the order
// of the selection, by the hash of the signature (Part 3, section 18.4).
func (j *judgement) values() bool {
	if j.Values == nil {
		j.warn(attest.ReasonPCRDigest, "PCR の値がありません。クォートのダイジェスト %x だけがあります。", "no PCR values were given: the quote's digest %x stands for itself", j.statement.PCRDigest)
		return true
	}
	if j.signature == nil {
		return false // nobody knows the hash
	}
	h := j.signature.Hash.New()
	for _, s := range j.report.Selection {
		for _, i := range s.PCRs {
			v, ok := j.Values[s.Bank][i]
			if !ok {
				return j.refuse(attest.ReasonPCRSelection, "クォートは PCR %d（バンク %s）を含みますが、その値がありません。", "the quote covers PCR %d of bank %s, of which no value is given", i, s.Bank)
			}
			h.Write(v)
		}
	}
	if got := h.Sum(nil); !bytes.Equal(got, j.statement.PCRDigest) {
		j.refuse(attest.ReasonPCRDigest, "PCR の値がクォートされたものではありません。", "the PCR values are not the quoted ones")
		f := &j.report.Findings[len(j.report.Findings)-1]
		f.Expected, f.Seen = hex.EncodeToString(j.statement.PCRDigest), hex.EncodeToString(got)
		return false
	}
	return true
}

// log judges the log by the quoted values alone, in the best bank that the
// quote covers and the log has.
func (j *judgement) log() bool {
	if j.Log == nil {
		return true
	}
	if j.Values == nil {
		return j.refuse(attest.ReasonPCRSelection, "クォートが証明する PCR の値がなければ、ログは何も示しません。", "a log is worth nothing without the PCR values that the quote proves")
	}
	quoted := make(map[eventlog.Bank]map[int][]byte)
	for _, s := range j.report.Selection {
		quoted[s.Bank] = make(map[int][]byte)
		for _, i := range s.PCRs {
			quoted[s.Bank][i] = j.Values[s.Bank][i]
		}
	}
	bank := j.Log.BestBank(quoted)
	if quoted[bank] == nil {
		return j.refuse(attest.ReasonPCRSelection, "クォートのバンクのダイジェストがログにありません。", "the quote covers no bank that the log has digests of")
	}
	j.report.Log = j.Log.Appraise(eventlog.Options{Bank: bank, PCRs: quoted[bank]})
	if j.report.Log.Verdict != eventlog.VerdictPass {
		return j.refuse(attest.ReasonLogReplay, "イベントログが拒否されました。理由はその所見にあります。", "the event log is refused; its findings say why")
	}
	return true
}
