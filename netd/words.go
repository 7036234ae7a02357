package netd

// Words is a sentence for the person at the laptop.
type Words struct {
	EN string `json:"en"`
	JA string `json:"ja"`
}

// ReasonPortal is the reason of the state Portal.
const ReasonPortal = "portal"

// reasons says each reason code in words that follow "Blocked:".
func reasons() map[string]Words {
	return map[string]Words{
		ReasonKernel:      {"the network cannot be set up safely; it is tried again by itself", "安全なネットワーク設定ができません。自動で再試行します。"},
		ReasonNoLink:      {"no network card found", "ネットワークカードが見つかりません。"},
		ReasonNoCarrier:   {"no network: plug in a cable or join a Wi-Fi network", "ネットワーク未接続です。ケーブルを挿すか、Wi-Fi に接続してください。"},
		ReasonNoLease:     {"this network gives no address; wait, or try another network", "ネットワークからアドレスを取得できません。しばらく待つか、別のネットワークをお試しください。"},
		ReasonBadLease:    {"this network is set up wrongly; use another network", "このネットワークの設定に誤りがあります。別のネットワークをご利用ください。"},
		ReasonNotAllowed:  {"your organisation does not allow this kind of network", "この種類のネットワークの利用は組織により許可されていません。"},
		ReasonUnserved:    {"a network card has no driver; tell the help desk", "ネットワークカードのドライバーがありません。ヘルプデスクに連絡してください。"},
		ReasonNoNetwork:   {"no known Wi-Fi network is in reach", "登録済みの Wi-Fi が見つかりません。"},
		ReasonWrongSecret: {"the Wi-Fi password was not accepted", "Wi-Fi のパスワードが違います。"},
		ReasonNoRadio:     {"Wi-Fi is not working; restart the laptop if it stays so", "Wi-Fi が動作していません。続く場合は再起動してください。"},
		ReasonNoIdentity:  {"this network wants the laptop's network identity, which it has not got yet; connect once by another network", "このネットワークには端末の証明書が必要ですが、まだ発行されていません。一度、別のネットワークに接続してください。"},
		ReasonAttestd:     {"the security check has not started yet", "セキュリティ検査がまだ開始されていません。"},
		ReasonVerifier:    {"the organisation's verifier does not answer over this network", "検証サーバーに接続できません。"},
		ReasonAttestation: {"the security check is under way", "セキュリティ検査を実施しています。"},
		ReasonLapsed:      {"attestation lapsed; it is renewed as soon as the verifier answers", "検証の有効期限が切れました。検証サーバーに接続でき次第、自動で更新します。"},
		ReasonConnecting:  {"opening the tunnel", "トンネルを接続しています。"},
		ReasonGateway:     {"the gateway does not answer over this network", "ゲートウェイに接続できません。"},
		ReasonRefused:     {"the gateway did not admit this laptop; tell the help desk", "ゲートウェイに接続を拒否されました。ヘルプデスクに連絡してください。"},
		ReasonProxy:       {"the proxy does not let this laptop through to the gateway; tell the help desk", "プロキシがゲートウェイへの接続を許可していません。ヘルプデスクに連絡してください。"},
		ReasonPortal:      {"somebody else answers in place of the organisation's servers", "組織のサーバーではない応答があります。"},
	}
}

// Words says what becomes of saved networks.
func (a Access) Words() Words {
	switch a.State {
	case AccessKept:
		return Words{"saved networks are kept", "保存したネットワークは電源を切っても保持されます。"}
	case AccessVolatile:
		return Words{"networks are saved until power-off only", "ネットワークの保存は電源を切るまでです。"}
	}
	return Words{"saved networks are not kept yet", "保存したネットワークはまだ保持されていません。"}
}

// Say puts the status in the words that a person sees first: Office, LGWAN,
// sign in, or blocked and why.
func (s Status) Say() Words {
	switch s.State {
	case Office:
		site := ""
		if s.Office != nil {
			site = s.Office.Site
		}
		w := Words{"Office " + site, "庁内ネットワーク（" + site + "）に接続中"}
		if s.Tunnel == nil {
			w.EN += "; LGWAN is not reachable at the moment"
			w.JA += "。LGWAN には現在接続できません。"
		}
		return w
	case Tunnel:
		return Words{"LGWAN", "LGWAN に接続中"}
	case Portal:
		if s.Uplink.Kind == KindWifi {
			return Words{"Sign in to this Wi-Fi", "この Wi-Fi にサインインしてください"}
		}
		return Words{"Sign in to this network", "このネットワークにサインインしてください"}
	}
	why, known := reasons()[s.Reason]
	if !known { // attestation's own
		why = Words{"the security check does not admit this laptop (" + s.Reason + "); tell the help desk", "セキュリティ検査により接続が許可されていません（" + s.Reason + "）。ヘルプデスクに連絡してください。"}
	}
	if s.State == Dark && len(s.Unserved) > 0 { // it may be the one that people wait for
		w := s.Unserved[0].Words()
		why = Words{why.EN + "; " + w.EN, why.JA + w.JA}
	}
	if s.Uplink.SignIn && (s.Reason == ReasonVerifier || s.Reason == ReasonGateway || s.Reason == ReasonLapsed) {
		why = Words{why.EN + "; it says that it has a sign-in page", why.JA + "サインインページのあるネットワークのようです。"}
	}
	return Words{"Blocked: " + why.EN, "遮断中: " + why.JA}
}
