package attest

import "fmt"

// Text is one sentence in the two languages of those who read it.
type Text struct {
	JA string `json:"ja,omitempty"`
	EN string `json:"en,omitempty"`
}

// In returns the text in language "ja" or "en", or in the other where that one
// is missing.
func (t Text) In(language string) string {
	if language == "ja" && t.JA != "" || t.EN == "" {
		return t.JA
	}
	return t.EN
}

// Severity says what a finding does to the result. The zero value refuses.
type Severity uint8

// The severities, numbered by hand.
const (
	SeverityBlock   Severity = 0 // the result is contraindicated
	SeverityDegrade Severity = 1 // the result is at best a warning
	SeverityWarn    Severity = 2 // reported, changes nothing
)

var severityNames = [...]string{"block", "degrade", "warn"}

func (s Severity) String() string {
	if int(s) < len(severityNames) {
		return severityNames[s]
	}
	return fmt.Sprintf("severity-%d", uint8(s))
}

// ParseSeverity is the inverse of Severity.String.
func ParseSeverity(s string) (Severity, error) {
	for i, name := range severityNames {
		if s == name {
			return Severity(i), nil
		}
	}
	return SeverityBlock, fmt.Errorf("unknown severity %.64q: want block, degrade or warn", s)
}

// MarshalText implements encoding.TextMarshaler.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Severity) UnmarshalText(b []byte) (err error) {
	*s, err = ParseSeverity(string(b))
	return err
}

// Words are what a reason means to people and what they can do about it.
type Words struct {
	Sentence, Action Text
}

// Words returns the sentence and the action of a reason. Reasons without words
// of their own get general ones: no refusal is left without something to do.
func (r Reason) Words() Words {
	if w, ok := reasonWords[r]; ok {
		return w
	}
	return words("%[1]s という理由で拒否されました。", "Refused for the reason %[1]s.",
		"詳細を確認し、担当者に連絡してください。", "Read the detail and ask the security team.").with(r.String())
}

func (w Words) with(name string) Words {
	w.Sentence.JA, w.Sentence.EN = fmt.Sprintf(w.Sentence.JA, name), fmt.Sprintf(w.Sentence.EN, name)
	return w
}

func words(ja, en, doJA, doEN string) Words {
	return Words{Text{ja, en}, Text{doJA, doEN}}
}

const (
	retryJA, retryEN   = "端末が自動でやり直します。続く場合は通信経路と時刻を確認してください。", "The device tries again by itself; if this goes on, check the clock and the path to the verifier."
	attackJA, attackEN = "通常の利用では起こりません。端末を隔離し、報告書を保存して調査してください。", "This does not happen in normal use; isolate the device, keep the report and investigate."
	ticketJA, ticketEN = "新しい登録チケットを発行してください（attestctl enroll create）。", "Make a new enrolment ticket (attestctl enroll create)."
	cardJA, cardEN     = "証明書を発行しないでください。端末で logind request -json をやり直し、続く場合は端末を調査してください。", "Issue no certificate; run logind request -json on the device again, and investigate the device if this goes on."
	firmJA, firmEN     = "ファームウェアを更新してから再起動してください。続く場合はイベントログを添えて機器メーカーに連絡してください。", "Update the firmware and start again; if this goes on, send the event log to the maker."
)

var reasonWords = map[Reason]Words{
	ReasonNone:              words("問題はありません。", "Nothing is wrong.", "何もする必要はありません。", "Nothing is to be done."),
	ReasonEvidenceMalformed: words("証拠の形式が正しくありません。", "The evidence is malformed.", "端末のホスト領域を現在のリリースに更新してください。", "Update the device's host domain to the current release."),
	ReasonEvidenceTooLarge:  words("証拠が大きすぎます。", "The evidence is too large.", "端末のホスト領域を現在のリリースに更新してください。", "Update the device's host domain to the current release."),
	ReasonVerifierMismatch:  words("この証拠は別の検証サーバー宛てです。", "The evidence was made for another verifier.", retryJA, retryEN),
	ReasonPurposeMismatch:   words("この用途の資格情報は発行していません。", "No credential is issued for this purpose.", "端末のホスト領域を現在のリリースに更新してください。", "Update the device's host domain to the current release."),
	ReasonNonceInvalid:      words("ノンスがこの組織の検証サーバーのものではありません。", "The nonce is not one of this organisation's verifiers.", retryJA, retryEN),
	ReasonNonceExpired:      words("ノンスの有効期限が切れています。", "The nonce has expired.", retryJA, retryEN),
	ReasonNonceReused:       words("ノンスはすでに使われています。", "The nonce was used before.", attackJA, attackEN),
	ReasonDeviceMismatch:    words("ノンスは別の端末に渡されたものです。", "The nonce was given to another device.", attackJA, attackEN),
	ReasonDeviceUnknown:     words("端末が登録されていません。", "The device is not enrolled.", "登録チケットを発行して端末を登録してください。", "Make a ticket and enrol the device."),
	ReasonSignatureInvalid:  words("署名が、登録された証明鍵のものではありません。", "The quote is not signed by the attestation key on record.", "TPM を消去した場合は再登録し、そうでなければ端末を調査してください。", "Re-enrol the device if its TPM was cleared; otherwise investigate it."),
	ReasonQuoteMagic:        words("TPM が作った証拠ではありません。", "The statement was not made by a TPM.", attackJA, attackEN),
	ReasonQuoteType:         words("クォートではない TPM の署名が送られました。", "The TPM statement is not a quote.", attackJA, attackEN),
	ReasonQuoteSigner:       words("クォートが別の鍵を署名者としています。", "The quote names another signer.", attackJA, attackEN),
	ReasonBindingMismatch:   words("クォートは別のノンス、端末、鍵またはログのために作られました。", "The quote was made for another nonce, device, key or event log.", attackJA, attackEN),
	ReasonPCRSelection:      words("クォートされた PCR の組が規定と異なります。", "The quote does not cover exactly the required PCRs.", attackJA, attackEN),
	ReasonPCRDigest:         words("PCR の値がクォートと一致しません。", "The PCR values are not the quoted ones.", attackJA, attackEN),
	ReasonClockReversed:     words("TPM の時計またはリセット回数が戻りました。", "The TPM's clock or reset count went back.", "TPM を消去した場合は再登録し、そうでなければ端末を調査してください。", "Re-enrol the device if its TPM was cleared; otherwise investigate it."),
	ReasonClockUnsafe:       words("電源断の後、TPM の時計が戻った可能性があります。", "The TPM's clock may have gone back after a power cut.", "端末を一度正しく終了してから起動してください。", "Shut the device down in order and start it again."),
	ReasonKeyNotCertified:   words("証明書の鍵が、この端末の TPM で証明されていません。", "The certificate's key is not certified by this device's TPM.", attackJA, attackEN),
	ReasonKeyAttributes:     words("証明書の鍵が、TPM から出せない鍵の条件を満たしません。", "The certificate's key is not one that cannot leave the TPM.", attackJA, attackEN),
	ReasonLogTooLarge:       words("イベントログが大きすぎます。", "The event log is too large.", firmJA, firmEN),
	ReasonLogMalformed:      words("イベントログを読み取れません。", "The event log cannot be read.", firmJA, firmEN),
	ReasonLogNoSHA256:       words("イベントログに SHA-256 がありません。", "The event log has no SHA-256 digests.", "ファームウェア設定で TPM の SHA-256 バンクを有効にしてください。", "Enable the TPM's SHA-256 bank in the firmware setup."),
	ReasonLogMissingEvents:  words("PCR を拡張した内容がイベントログにありません。", "A PCR was extended and the event log does not say by what.", attackJA, attackEN),
	ReasonLogReplay:         words("イベントログから PCR の値を再現できません。", "The event log does not give the quoted PCR values.", firmJA, firmEN),
	ReasonLogSeparator:      words("イベントログの区切りが正しくありません。", "The event log's separators are not right.", firmJA, firmEN),
	ReasonLogEventType:      words("その PCR にあるはずのない種類のイベントがあります。", "The event log has an event of a type that does not belong into its PCR.", firmJA, firmEN),
	ReasonLogEventDigest:    words("イベントのダイジェストがその内容と一致しません。", "An event's digest is not that of its data.", firmJA, firmEN),
	ReasonLogOrder:          words("イベントの順序が正しくありません。", "An event of the log is out of its place.", firmJA, firmEN),
	ReasonRunLogMalformed:   words("起動後のイベントの記録を読み取れません。", "The log of run-time events cannot be read.", "端末のホスト領域を現在のリリースに更新してください。", "Update the device's host domain to the current release."),
	ReasonRunLogReplay:      words("起動後の PCR の変化が、記録されたイベントと一致しません。", "PCR 14 or 15 was extended by something else than the recorded run-time events.", attackJA, attackEN),
	ReasonVolumeChanged:     words("最初に記録されたものと異なる業務ディスクが使われています。", "Another work disk is in use than the one first seen with this device.", "ディスクを交換または作り直した場合は、許可を得て再登録してください。心当たりがなければ端末を調査してください。", "If the disk was replaced or made anew, re-enrol the device with a permit; otherwise investigate it."),
	ReasonNoReferenceValues: words("検証サーバーに参照値がありません。", "The verifier has no reference values.", "リリースの参照値を署名して公開してください。", "Sign and publish the reference values of a release."),
	ReasonImageMismatch:     words("ホスト領域のイメージが、承認された値と異なります。", "The host domain's image differs from the approved one.", "新しいリリースならその参照値を承認し、そうでなければ正しいイメージを入れ直してください。", "Approve the values if this is a new release; otherwise install the approved image again."),
	ReasonImageUnknown:      words("起動したイメージは承認されていません。", "The image that was started is not an approved one.", "新しいリリースならその参照値を承認し、そうでなければ正しいイメージを入れ直してください。", "Approve the values if this is a new release; otherwise install the approved image again."),
	ReasonSecureBoot:        words("セキュアブートの設定が承認された値と異なります。", "The Secure Boot settings differ from the approved ones.", "ファームウェア設定でセキュアブートを有効にし、鍵を組織のものに戻してください。", "Turn Secure Boot on in the firmware setup and restore the organisation's keys."),
	ReasonPolicyRule:        words("組織のポリシーの規則を満たしていません。", "A rule of the organisation's policy is not met.", "規則の理由を確認し、その指示に従ってください。", "Read the rule's reason and do what it says."),
	ReasonNoPolicy:          words("有効な署名済みポリシーがありません。", "No signed policy is in force.", "ポリシーを署名して公開してください（attestctl policy publish）。", "Sign and publish a policy (attestctl policy publish)."),
	ReasonSuspended:         words("管理者が利用を停止しています。", "The administrators have suspended this.", "情報システム担当へ連絡してください。停止が解除されると自動的に復帰します。", "Ask the help desk; it comes back by itself when the suspension ends."),
	ReasonTicketUnknown:     words("登録チケットが無効です。", "The enrolment ticket is not one of this organisation's.", ticketJA, ticketEN),
	ReasonTicketExpired:     words("登録チケットの有効期限が切れています。", "The enrolment ticket has expired.", ticketJA, ticketEN),
	ReasonTicketUsed:        words("登録チケットは使い切られています。", "The enrolment ticket is used up.", ticketJA, ticketEN),
	ReasonEKMissing:         words("TPM に使用できる EK 証明書がありません。", "The TPM has no EK certificate that can be used.", "機器メーカーの手順で EK 証明書を書き込むか、購入リストで登録してください。", "Have the maker's tool provision the certificate, or enrol by a purchase list."),
	ReasonEKUntrusted:       words("EK 証明書が、信頼する TPM メーカーのものと確認できません。", "The EK certificate is not known to be a trusted TPM maker's.", "本物の TPM なら、そのメーカーの CA を確認のうえ固定リストに加えてください。", "If the TPM is genuine, verify its maker's CA and add it to the pinned list."),
	ReasonEKMismatch:        words("EK 証明書は別の鍵のものです。", "The EK certificate is for another key.", attackJA, attackEN),
	ReasonEKAttributes:      words("エンドースメント鍵が規定の種類ではありません。", "The endorsement key is not of a kind that can be used.", "TPM 2.0 の規定に合う TPM に交換してください。", "Use a device with a TPM that follows the TPM 2.0 profile."),
	ReasonAKAttributes:      words("証明鍵が規定の形ではありません。", "The attestation key is not of the required template.", attackJA, attackEN),
	ReasonChallengeFailed:   words("登録の確認に失敗しました。", "The answer to the enrolment's challenge is wrong.", attackJA, attackEN),
	ReasonChallengeExpired:  words("登録の確認が時間切れになりました。", "The enrolment's challenge has expired.", retryJA, retryEN),
	ReasonAlreadyEnrolled:   words("この端末または鍵はすでに登録されています。", "The device or its key is enrolled already.", "再登録には二人が署名した許可が必要です（attestctl permit）。", "To enrol it again, have a permit signed by two persons (attestctl permit)."),
	ReasonRequestMalformed:  words("要求の形式が正しくありません。", "The request is malformed.", "端末のホスト領域を現在のリリースに更新してください。", "Update the device's host domain to the current release."),
	ReasonBusy:              words("検証サーバーが混み合っています。", "The verifier is busy.", retryJA, retryEN),
	ReasonNoTPM:             words("TPM が見つかりません。", "No TPM was found.", "ファームウェア設定で TPM 2.0 を有効にしてください。", "Enable TPM 2.0 in the firmware setup."),
	ReasonTPMFault:          words("TPM を使用できません。", "The TPM cannot be used.", "電源を切ってから入れ直してください。続く場合は修理が必要です。", "Switch the device off and on; if this goes on, have it repaired."),
	ReasonNoTicket:          words("端末が登録されておらず、登録チケットもありません。", "The device is not enrolled and has no ticket.", ticketJA, ticketEN),
	ReasonUnreachable:       words("検証サーバーに接続できません。", "No verifier answers.", retryJA, retryEN),
	ReasonState:             words("状態パーティションを使用できません。", "The state partition cannot be used.", "ディスクを点検するか、再インストールしてください。", "Check the disk or install the device again."),
	ReasonCardSigner:        words("鍵の証明が、この端末の証明鍵によるものではありません。", "The key's certification is not by this device's attestation key.", cardJA, cardEN),
	ReasonCardAttributes:    words("カードの鍵の種類または属性が規定と異なります。", "The card's key is not of the required kind and attributes.", cardJA, cardEN),
	ReasonCardPolicy:        words("カードの鍵のポリシーが、このリリースのログオン用ポリシーではありません。", "The card's key opens under another policy than the release's for logon.", "この端末のリリース鍵の文書か確認し、正しければ logind setup で鍵を作り直してください。", "Check that the release document is by this device's release key; if it is, make the key anew with logind setup."),
	ReasonCardStatement:     words("TPM の証明が、この鍵のものではありません。", "The TPM's certification is not of this key in its place.", cardJA, cardEN),
	ReasonCardCSR:           words("証明書要求が読めないか、その鍵による署名がありません。", "The certificate request cannot be read or is not signed by its own key.", cardJA, cardEN),
	ReasonCardOtherKey:      words("証明書要求は、証明された鍵とは別の鍵のものです。", "The certificate request is for another key than the certified one.", cardJA, cardEN),
}
