package eventlog

import (
	"bytes"
	"strings"

	"sekisho/attest"
)

// seven judges the events of PCR 7, from which Secure Boot's state is drawn,
// one after the other. The firmware measures its policy there before the
// separator, and what it verified by that policy before and behind it (section
// 3.3.4.8). Who controls the system afterwards can add events behind the
// separator, and call any event what its digest allows.
type seven struct {
	*appraisal
	separates func(*Event) bool
	separated bool
	seen      map[string]bool // policy variables
}

func (s *seven) judge(e *Event) {
	switch {
	case e.Type == TypeSeparator || s.separates(e):
		s.separated = true
	case e.Type == TypeEFIAction:
		s.action(e)
	default: // all that belongs here besides is a variable
		s.variable(e)
	}
}

func (s *seven) variable(e *Event) {
	rest := uint64(0)
	if e.Type == TypeVariableAuth {
		rest = maxShimRest
	}
	v, err := parseVariable(e.Data, rest)
	switch {
	case err != nil && e.Type == TypeVariableConfig:
		s.findEvent(attest.SeverityBlock, attest.ReasonLogMalformed, e, say("変数を読み取れません（%v）。", "%v", err))
		return
	case err != nil: // no fact is drawn from it
		s.findEvent(attest.SeverityWarn, attest.ReasonLogMalformed, e, say("署名者の変数を読み取れません（%v）。", "authority: %v", err))
		return
	}
	name := v.policy()
	switch {
	case e.Type == TypeVariableAuth && v.guid == shimLock && v.name == "MokSBState" && bytes.Equal(v.data, []byte{1}):
		s.findEvent(attest.SeverityWarn, attest.ReasonSecureBoot, e, say("shim の検証が無効です（MokSBState）。shim が起動するものは確かめられていません。", "shim's verification is off (MokSBState): what shim started was not verified")).Action = attest.Text{JA: "「mokutil --enable-validation」で有効にしてください。", EN: "Switch it on with mokutil --enable-validation."}
	case name == "", e.Type == TypeVariableAuth && v.guid == securityDatabase:
		// Not policy; or the entry of a database that allowed an image.
	case e.Type != TypeVariableConfig:
		s.findEvent(attest.SeverityBlock, attest.ReasonLogEventType, e, say("変数 %s の種類が書き換えられています。ポリシーなのに %s として記録されています。", "variable %s is relabelled: it is policy and was logged as %s", name, TypeName(e.Type)))
	case s.separated:
		s.findEvent(attest.SeverityBlock, attest.ReasonLogOrder, e, say("変数 %s が区切りの後にあります。ファームウェアの後で追加されたか、この起動中にポリシーが変更されました。", "variable %s stands behind the separator: it was added after the firmware, or policy was changed during this boot", name)).Action = restart
	case s.seen[name]:
		s.findEvent(attest.SeverityDegrade, attest.ReasonLogOrder, e, say("変数 %s が二度記録されています。この起動中にポリシーが変更されました。", "variable %s comes twice: policy was changed during this boot", name)).Action = restart
	case name != "SecureBoot":
		if err := checkSignatureLists(v.data); err != nil {
			s.findEvent(attest.SeverityBlock, attest.ReasonLogMalformed, e, say("変数 %s を読み取れません（%v）。", "variable %s: %v", name, err))
		}
	}
	if e.Type == TypeVariableConfig {
		s.seen[name] = true
	}
}

// restart is what to do about a boot in which Secure Boot's policy changed.
var restart = attest.Text{
	JA: "端末を再起動してください。それでも続く場合は、ログが書き換えられたものとして調査してください。",
	EN: "Restart the machine. If this comes again, investigate it as a log that was tampered with.",
}

// action judges what the firmware says about itself in PCR 7. Each is legal;
// each is worth knowing.
func (s *seven) action(e *Event) {
	action := strings.TrimRight(string(e.Data), "\x00")
	switch {
	case action == "UEFI Debug Mode":
		s.findEvent(attest.SeverityDegrade, attest.ReasonSecureBoot, e, say("ファームウェアがデバッグモードです。", "the firmware is in debug mode"))
	case action == "DMA Protection Disabled":
		// HP EliteBook 830 G6 and others with the IOMMU off before boot.
		s.findEvent(attest.SeverityWarn, attest.ReasonSecureBoot, e, say("起動前の DMA 保護が無効です。", "protection against DMA is off before the boot")).Action = attest.Text{JA: "ファームウェア設定で起動前の DMA 保護を有効にしてください。", EN: "Switch on protection against DMA before boot in the firmware setup."}
	case strings.HasPrefix(action, "Security Level is Downgraded to "):
		// Thunderbolt firmware of the HP EliteBook 830 G6.
		s.findEvent(attest.SeverityWarn, attest.ReasonSecureBoot, e, say("Thunderbolt のセキュリティレベルが下げられています。", "Thunderbolt's security level was lowered")).Action = attest.Text{JA: "ファームウェア設定で Thunderbolt のセキュリティレベルを上げてください。", EN: "Raise Thunderbolt's security level in the firmware setup."}
	case strings.ContainsFunc(action, func(r rune) bool { return r < ' ' || r > '~' }):
		s.findEvent(attest.SeverityBlock, attest.ReasonLogEventType, e, say("文字列でないアクションです。別のイベントの種類が書き換えられています。", "an action that is no text: another event was relabelled"))
	default:
		s.findEvent(attest.SeverityDegrade, attest.ReasonLogEventType, e, say("未知のアクション %.64q です。", "unknown action %.64q", action))
	}
}

// policyEvent is a policy variable and the event that measured it.
type policyEvent struct {
	event *Event
	data  []byte
}

// policySeven reads the policy variables that the firmware measured before
// PCR 7's separator, by name, and under the name "authority" whether an image
// was verified by them. ok is false if one comes twice or behind the separator:
// then nobody knows which policy was in force. The rules must have passed.
func (l *Log) policySeven(b Bank) (policy map[string]*policyEvent, ok bool) {
	policy = make(map[string]*policyEvent)
	separates, separated := b.separates(), false
	for i := range l.Events {
		e := &l.Events[i]
		switch {
		case e.PCR != 7:
		case e.Type == TypeSeparator || separates(e):
			separated = true
		case e.Type == TypeVariableAuth:
			policy["authority"] = &policyEvent{event: e}
		case e.Type == TypeVariableConfig:
			v, err := parseVariable(e.Data, 0)
			if err != nil || v.policy() == "" {
				continue
			}
			if separated || policy[v.name] != nil {
				return nil, false
			}
			policy[v.name] = &policyEvent{e, v.data}
		}
	}
	return policy, true
}

// secureBoot derives the state from PCR 7: the one SecureBoot variable, of
// exactly one byte, 0 or 1, with a digest that covers it; and on only beside
// PK, KEK and db, without which no firmware verifies anything (UEFI 2.10,
// section 32.3), and an authority, by which it did. Anything else is unknown:
// an absent or empty variable (an Arch Linux workstation of the corpus), a
// second one, or one behind the separator.
func (l *Log) secureBoot(b Bank) SecureBoot {
	policy, ok := l.policySeven(b)
	state := policy["SecureBoot"]
	if !ok || state == nil || len(state.data) != 1 || !bytes.Equal(b.Sum(nil, state.event.Data), state.event.DigestIn(b)) {
		return SecureBootUnknown
	}
	switch state.data[0] {
	case 0:
		return SecureBootOff
	case 1:
		for _, name := range []string{"PK", "KEK", "db"} {
			if v := policy[name]; v == nil || len(v.data) == 0 {
				return SecureBootUnknown
			}
		}
		if policy["authority"] != nil {
			return SecureBootOn
		}
	}
	return SecureBootUnknown
}
